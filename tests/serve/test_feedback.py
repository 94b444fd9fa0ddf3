"""What users say of answers: kept where a key allows it, by ids that cannot be forged."""

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.files.folder import StorageError
from vpo_ray.prompts.conditions import Conditions
from vpo_ray.recipe import Feedback, Serve
from vpo_ray.serve import feedback
from vpo_ray.serve.answer_ids import AnswerIds, SecretMissing
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.feedback import FeedbackDesk
from vpo_ray.serve.keys import ANYONE, Key, KeyFileError, parse_line
from vpo_ray.serve.optimize_schema import Optimization, SafetyOutcome
from vpo_ray.storage.feedback_tables import FeedbackTables

STUDIO, OTHER, SILENT = (Key(name, "", feedback=name != "silent") for name in ("studio", "other", "silent"))


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPO_FEEDBACK_SECRET", "a secret of the tests")
    monkeypatch.setattr(feedback, "FLUSH_S", 0.01)


def answered(prompt: str | None = "A red ball rolls.", **more: Any) -> Optimization:
    return Optimization(
        prompt=prompt, alternatives=["A ball."], model="vpo", system_fingerprint="fp-1", **more
    )


def said(id: str | None, **more: Any) -> bytes:
    return json.dumps({"id": id, **more}).encode()


async def flushed(desk: FeedbackDesk) -> None:
    for appender in (desk.answers, desk.opinions):
        if appender.task is not None:
            await asyncio.wait_for(appender.task, 10)


def with_desk(store: Path | str, work: Any, **settings: Any) -> Any:
    async def run() -> Any:
        desk = FeedbackDesk(Feedback(store=str(store), **settings))
        result = work(desk)
        await flushed(desk)
        return result

    return asyncio.run(run())


def test_an_answer_and_what_is_said_of_it_are_kept(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> str | None:
        first = desk.note(STUDIO, "red ball", answered())
        assert desk.note(STUDIO, "red ball", answered()).id == first.id
        assert desk.note(OTHER, "red ball", answered()).id != first.id
        for _ in range(2):
            desk.take(STUDIO, said(first.id, rating="up", comment="gut — 好"))
        desk.take(STUDIO, said(first.id, chosen=1))
        return first.id

    id = with_desk(tmp_path, work)
    tables = FeedbackTables(str(tmp_path))
    answers = {row["key"]: row for row in tables.answers.rows()}
    assert set(answers) == {"studio", "other"}
    assert answers["studio"]["query"] == "red ball"
    assert answers["studio"]["checkpoint"] == "fp-1"
    opinions = sorted(tables.opinions.rows(), key=lambda row: row["rating"] or "")
    assert [(row["rating"], row["chosen"], row["comment"]) for row in opinions] == [
        (None, 1, None),
        ("up", None, "gut — 好"),
    ]
    assert {row["answer_id"] for row in opinions} == {id.partition(".")[0]}


def test_ids_are_of_one_key_and_cannot_be_forged(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> None:
        id = desk.note(STUDIO, "red ball", answered()).id
        assert id is not None
        name, mark = id.split(".")
        for key, given in (
            (OTHER, id),
            (STUDIO, name),
            (STUDIO, f"{name}.{'0' * 32}"),
            (STUDIO, f"{'0' * 32}.{mark}"),
            (STUDIO, f"{name}.ü"),
            (STUDIO, "."),
        ):
            with pytest.raises(ApiError) as refused:
                desk.take(key, said(given, rating="up"))
            assert refused.value.status == 404, given

    with_desk(tmp_path, work)
    assert not list(FeedbackTables(str(tmp_path)).opinions.rows())


def test_a_key_that_does_not_allow_it_leaves_nothing(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> None:
        assert desk.note(SILENT, "red ball", answered()).id is None
        assert desk.note(ANYONE, "red ball", answered()).id is None
        with pytest.raises(ApiError) as refused:
            desk.take(SILENT, said("x", rating="up"))
        assert (refused.value.status, refused.value.code) == (403, "feedback_not_allowed")

    with_desk(tmp_path, work)
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_endpoint_without_keys_may_keep_what_anyone_says(tmp_path: Path) -> None:
    # A replica's code arrives pickled, with a caller of its own.
    caller = pickle.loads(pickle.dumps(ANYONE))
    assert with_desk(tmp_path, lambda desk: desk.note(caller, "q", answered()), anyone=True).id


def test_what_is_no_answer_has_no_id(tmp_path: Path) -> None:
    def work(desk: FeedbackDesk) -> None:
        refused = answered(None, safety=SafetyOutcome(outcome="refused", reason="violence"))
        assert desk.note(STUDIO, "q", refused).id is None
        assert desk.note(STUDIO, "q", answered("q", fallback=True)).id is None
        assert desk.note(STUDIO, "q", answered("q", skipped=True)).id is None
        assert desk.note(STUDIO, "q", answered("")).id is None

    with_desk(tmp_path, work)


def test_only_hashes_are_kept_where_the_recipe_says_so(tmp_path: Path) -> None:
    with_desk(tmp_path, lambda desk: desk.note(STUDIO, "secret plans", answered()), queries="hash")
    (row,) = FeedbackTables(str(tmp_path)).answers.rows()
    assert row["query"] is None
    assert b"secret plans" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.parquet"))


def test_what_a_request_said_is_not_kept_beside_the_hash(tmp_path: Path) -> None:
    """Neither by an answer that is the query itself, nor by the words that its prompt should have in it."""

    def work(desk: FeedbackDesk) -> None:
        wishes = Conditions(keep=("Mr Secret",), avoid=("a rival",))
        assert desk.note(STUDIO, "plans", answered(), wishes).id is not None
        other = answered().model_copy(update={"alternatives": ["secret plans"]})
        assert desk.note(STUDIO, " secret plans", other).id is None
        assert desk.note(STUDIO, " secret plans", answered("secret plans")).id is None

    with_desk(tmp_path, work, queries="hash")
    (row,) = FeedbackTables(str(tmp_path)).answers.rows()
    assert (row["conditions"], row["prompt"]) == (None, "A red ball rolls.")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 422),
        (said(None, rating="up"), 422),
        (said("x"), 422),
        (said("x", rating="meh"), 422),
        (said("x", chosen=-1), 422),
        (said("x", chosen="1"), 422),
        (said("x", comment=""), 422),
        (said("x", comment="y" * 2001), 422),
        (said("x", edited="\ud800"), 422),
    ],
)
def test_bad_bodies_are_refused(tmp_path: Path, body: bytes, status: int) -> None:
    def work(desk: FeedbackDesk) -> None:
        with pytest.raises(ApiError) as refused:
            desk.take(STUDIO, body)
        assert refused.value.status in (status, 400)

    with_desk(tmp_path, work)


@pytest.mark.parametrize("error", [StorageError, OSError, MemoryError])
def test_rows_wait_while_the_store_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    from vpo_ray.storage.tables import Table

    write, calls = Table.append, []

    def failing(self: Table, rows: Any) -> str:
        calls.append(len(rows))
        if len(calls) < 3:
            raise error("no network")
        return write(self, rows)

    monkeypatch.setattr(Table, "append", failing)
    with_desk(tmp_path, lambda desk: desk.note(STUDIO, "red ball", answered()))
    assert len(calls) == 3
    assert FeedbackTables(str(tmp_path)).answers.count() == 1


def test_what_waits_is_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpo_ray.storage.tables import Table

    monkeypatch.setattr(feedback, "FLUSH_S", 600)

    async def ended(store: Path) -> None:
        desk = FeedbackDesk(Feedback(store=str(store)))
        desk.take(STUDIO, said(desk.note(STUDIO, "red ball", answered()).id, rating="up"))
        await asyncio.sleep(0)
        await asyncio.wait_for(desk.close(), 10)

    asyncio.run(ended(tmp_path / "good"))
    tables = FeedbackTables(str(tmp_path / "good"))
    assert (tables.answers.count(), tables.opinions.count()) == (1, 1)

    def failing(self: Table, rows: Any) -> str:
        raise StorageError("no network")

    monkeypatch.setattr(Table, "append", failing)
    asyncio.run(ended(tmp_path / "failing"))  # it does not wait for a store that fails


@pytest.mark.parametrize("when", ["before", "while"])
def test_what_a_replica_still_holds_is_forgotten_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from vpo_ray.storage.tables import Table

    monkeypatch.setattr(feedback, "FLUSH_S", 600)
    tables, write = FeedbackTables(str(tmp_path)), Table.append

    def overtaken(self: Table, rows: Any) -> str:
        # The marks were read; now someone forgets, and looks for rows before these are written.
        monkeypatch.setattr(Table, "append", write)
        tables.forget(key="studio")
        return write(self, rows)

    async def ended() -> None:
        desk = FeedbackDesk(Feedback(store=str(tmp_path)))
        desk.take(STUDIO, said(desk.note(STUDIO, "red ball", answered()).id, rating="up"))
        desk.note(OTHER, "red ball", answered())
        if when == "before":
            tables.forget(key="studio")
        else:
            monkeypatch.setattr(Table, "append", overtaken)
        await asyncio.wait_for(desk.close(), 10)

    asyncio.run(ended())
    assert [row["key"] for row in tables.answers.rows()] == ["other"]
    assert tables.opinions.count() == 0
    assert "studio" not in "".join(path.name for path in tmp_path.rglob("*"))


def test_what_comes_later_is_kept_again(tmp_path: Path) -> None:
    tables = FeedbackTables(str(tmp_path))
    with_desk(tmp_path, lambda desk: desk.note(STUDIO, "red ball", answered()))
    (row,) = tables.answers.rows()
    assert tables.forget(key="studio") == (1, 0)
    later = row | {"answer_id": "later", "time": row["time"] + 60}
    tables.append(tables.answers, [row, later])
    assert [row["answer_id"] for row in tables.answers.rows()] == ["later"]


def test_what_is_too_old_does_not_come_back_with_rows_that_waited(tmp_path: Path) -> None:
    tables = FeedbackTables(str(tmp_path))
    with_desk(tmp_path, lambda desk: desk.note(STUDIO, "red ball", answered()))
    (row,) = tables.answers.rows()
    old, young = (row | {"answer_id": name, "time": time} for name, time in (("old", 1.0), ("young", 3.0)))
    assert tables.forget(before=2.0) == (0, 0)
    tables.append(tables.answers, [old, young])  # of a replica whose store failed meanwhile
    assert {one["answer_id"] for one in tables.answers.rows()} == {row["answer_id"], "young"}


def test_two_calls_that_forget_at_once_bring_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpo_ray.storage.tables import Table

    tables, write = FeedbackTables(str(tmp_path)), Table.append
    with_desk(tmp_path, lambda desk: desk.note(STUDIO, "red ball", answered()))
    (row,) = tables.answers.rows()
    old = row | {"answer_id": "old", "key": "other", "time": 1.0}
    other = row | {"answer_id": "other", "key": "other"}
    tables.answers.append([row, old, other])

    def overtaken(self: Table, rows: Any) -> str:
        # The part was read with the old row; another call takes it out before this one writes.
        if not rows:
            return write(self, rows)
        monkeypatch.setattr(Table, "append", write)
        tables.forget(before=2.0)
        return write(self, rows)

    monkeypatch.setattr(Table, "append", overtaken)
    tables.forget(key="studio")
    assert [one["answer_id"] for one in tables.answers.rows()] == ["other"]


def test_a_broken_mark_keeps_rows_waiting(tmp_path: Path) -> None:
    (tmp_path / "forgotten").mkdir()
    (tmp_path / "forgotten" / "abc.json").write_text("{", "utf-8")
    tables = FeedbackTables(str(tmp_path))
    with pytest.raises(StorageError, match=r"forgotten/abc.json is no mark of `vpo forget` that can be read"):
        tables.append(tables.answers, [])


def test_a_secret_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "short"):
        monkeypatch.setenv("VPO_FEEDBACK_SECRET", value)
        with pytest.raises(SecretMissing, match="VPO_FEEDBACK_SECRET has no secret of 16 characters"):
            AnswerIds("VPO_FEEDBACK_SECRET")


def test_lines_of_keys_say_whether_feedback_is_allowed() -> None:
    digest = "0" * 64
    assert parse_line(f"studio {digest} feedback=yes").feedback
    assert not parse_line(f"studio {digest}").feedback
    with pytest.raises(KeyFileError, match="feedback=maybe"):
        parse_line(f"studio {digest} feedback=maybe")


def test_nobody_is_kept_by_default() -> None:
    assert Serve().feedback is None
    with pytest.raises(ValueError, match="nobody can allow it"):
        Serve.model_validate({"feedback": {"store": "x"}})
    with pytest.raises(ValueError, match="anyone has no effect"):
        Serve.model_validate({"keys": "keys", "feedback": {"store": "x", "anyone": True}})
