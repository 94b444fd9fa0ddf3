"""What users said becomes queries, pairs and figures; what they take back is gone."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.cli import main
from vpo_ray.evaluation.live import collect
from vpo_ray.records import PAIR, Row
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.tables import Table


def answer(name: str, query: str | None, prompt: str, *alternatives: str, **more: Any) -> Row:
    return {
        "answer_id": name,
        "key": "studio",
        "time": 1000.0,
        "checkpoint": "fp-1",
        "query_hash": f"hash of {query}",
        "query": query,
        "prompt": prompt,
        "alternatives": list(alternatives),
        "safety": "pass",
        **more,
    }


def opinion(name: str, of: str, **more: Any) -> Row:
    empty = dict.fromkeys(("rating", "chosen", "edited", "comment"))
    return {"opinion_id": name, "answer_id": of, "key": "studio", "time": 2000.0, **empty, **more}


@pytest.fixture
def store(tmp_path: Path) -> FeedbackTables:
    tables = FeedbackTables(str(tmp_path / "store"))
    tables.answers.append(
        [
            answer("a", "red ball", "A red ball rolls.", "A ball.", "A red sphere rests."),
            answer("b", "red ball", "Something red.", time=5000.0),
            answer("c", None, "A cat."),
            answer(
                "d", "knife fight", "Two actors rehearse.", key="other", safety="rewritten", checkpoint="fp-2"
            ),
        ]
    )
    tables.opinions.append(
        [
            opinion("1", "a", rating="up"),
            opinion("2", "b", rating="down"),
            opinion("3", "a", edited=" A red ball rolls slowly. "),
            opinion("4", "a", chosen=2),
            opinion("5", "c", edited="A cat sleeps."),
            opinion("6", "d", chosen=7, key="other"),
            opinion("7", "gone", rating="up"),
            opinion("8", "d", edited="Two actors rehearse.", key="other"),
        ]
    )
    return tables


def pairs(folder: Path) -> set[tuple[str, str, str]]:
    rows = Table(str(folder / "pairs"), PAIR, "pair_id").rows()
    return {(row["query"], row["chosen"], row["rejected"]) for row in rows}


def test_pairs_are_asked_under_the_wishes_of_their_request(tmp_path: Path) -> None:
    tables = FeedbackTables(str(tmp_path / "store"))
    short = '{"max_words": 3}'
    tables.answers.append(
        [
            answer("a", "red ball", "A red ball.", "A ball rolls on.", conditions=short),
            answer("b", "red ball", "Something red.", conditions=short),
            answer("c", "red ball", "A red ball rests on moss."),
            answer("d", "red ball", "Red and round it rolls.", conditions=short),
        ]
    )
    tables.opinions.append(
        [
            opinion("1", "a", rating="up"),
            opinion("2", "b", rating="down"),
            opinion("3", "c", rating="down"),
            opinion("4", "a", edited="A red ball rolls along."),
            opinion("5", "a", chosen=1),
            opinion("6", "d", rating="up"),
        ]
    )
    figures = collect(tables.uri, str(tmp_path / "live"))
    (pair,) = Table(str(tmp_path / "live/pairs"), PAIR, "pair_id").rows()
    assert (pair["chosen"], pair["rejected"]) == ("A red ball.", "Something red.")
    assert pair["conditions"] == short
    assert figures["left_out"] == {"better prompt that does not meet the wishes of its request": 3}


def test_pairs_come_from_edits_choices_and_thumbs(store: FeedbackTables, tmp_path: Path) -> None:
    figures = collect(store.uri, str(tmp_path / "live"))
    assert pairs(tmp_path / "live") == {
        ("red ball", "A red ball rolls slowly.", "A red ball rolls."),
        ("red ball", "A red sphere rests.", "A red ball rolls."),
        ("red ball", "A red sphere rests.", "A ball."),
        ("red ball", "A red ball rolls.", "Something red."),
    }
    assert figures["left_out"] == {
        "chosen candidate that is none of the answer": 1,
        "edited prompt that is the same": 1,
        "opinion on a query of which only a hash is kept": 1,
        "opinion on an answer that is not kept": 1,
    }
    lines = (tmp_path / "live/queries.jsonl").read_text("utf-8").splitlines()
    assert [(row["query"], row["unsafe"]) for row in map(json.loads, lines)] == [
        ("knife fight", True),
        ("red ball", False),
    ]
    first = figures["checkpoints"]["fp-1"]
    assert (first["answers"], first["spoken_of"]) == (3, 3)
    assert first["liked"]["value"] == pytest.approx(1 / 3)
    assert first["liked"]["ci_low"] < 1 / 3 < first["liked"]["ci_high"]


def test_every_pair_names_what_it_was_made_of(store: FeedbackTables, tmp_path: Path) -> None:
    collect(store.uri, str(tmp_path / "live"))
    rows = Table(str(tmp_path / "live/pairs"), PAIR, "pair_id").rows()
    assert {(row["chosen_id"], row["rejected_id"]) for row in rows} == {
        ("said:3", "said:a"),
        ("said:4", "said:a"),
        ("said:a", "said:b"),
    }


def test_an_answer_that_is_liked_and_disliked_says_nothing(store: FeedbackTables, tmp_path: Path) -> None:
    store.opinions.append([opinion("9", "a", rating="down")])
    figures = collect(store.uri, str(tmp_path / "live"))
    assert figures["left_out"]["answer that was liked and disliked"] == 1
    assert ("red ball", "A red ball rolls.", "Something red.") not in pairs(tmp_path / "live")


def test_a_key_that_leaves_is_gone_from_tables_and_exports(
    store: FeedbackTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = str(tmp_path / "live")
    assert main(["collect", store.uri, "--to", live]) == 0
    assert "4 answers" in capsys.readouterr().out
    assert main(["forget", store.uri, "--key", "studio", "--collected", live]) == 0
    assert "9 rows and 0 images are gone" in capsys.readouterr().out
    for table in (store.answers, store.opinions):
        assert {row["key"] for row in table.rows()} == {"other"}
    assert not pairs(tmp_path / "live")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"red ball" not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "left"),
    [(["--answer", "a.mark"], {"b", "c", "d"}), (["--older-than", "1m"], set())],
)
def test_answers_are_forgotten_by_id_and_by_age(
    store: FeedbackTables, options: list[str], left: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", store.uri, *options]) == 0
    assert {row["answer_id"] for row in store.answers.rows()} == left
    assert "a" not in {row["answer_id"] for row in store.opinions.rows()}


def test_a_store_that_is_empty_gives_nothing(tmp_path: Path) -> None:
    figures = collect(str(tmp_path / "store"), str(tmp_path / "live"))
    assert (figures["answers"], figures["pairs"], figures["checkpoints"]) == (0, 0, {})


def test_a_folder_that_was_not_collected_is_told_before_anything_is_forgotten(
    store: FeedbackTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is mistyped would leave the data in the folder that was meant."""
    live, typo = str(tmp_path / "live"), str(tmp_path / "lvie")
    assert main(["collect", store.uri, "--to", live]) == 0
    assert main(["forget", store.uri, "--key", "studio", "--collected", live, "--collected", typo]) != 0
    assert "lvie" in capsys.readouterr().err
    assert not Path(typo).exists()
    assert "studio" in {row["key"] for row in store.answers.rows()}


@pytest.mark.parametrize("command", [["collect", "--to", "live"], ["forget", "--key", "studio"]])
def test_a_store_that_is_not_there_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "feedbakc", *command[1:]]) != 0
    assert "feedbakc: no such folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["run", "store"])
def test_collected_data_replaces_no_run_and_no_store(
    store: FeedbackTables, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / which
    if which == "run":
        there.mkdir()
        (there / "recipe.yaml").write_text("out: run\n", "utf-8")
    image = there / "images" / f"{'a' * 64}.png"
    image.parent.mkdir()
    image.write_bytes(b"an image of the run, or of a row that came meanwhile")
    before = sorted(tmp_path.rglob("*"))
    assert main(["collect", store.uri, "--to", str(there)]) != 0
    assert "give a folder of its own" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def small_parts(store: FeedbackTables) -> dict[str, Row]:
    """Twenty answers as replicas write them, a part each; returns them by id."""
    rows = {f"n{i}": answer(f"n{i}", f"query {i}", "A prompt.", time=3000.0 + i) for i in range(20)}
    for row in rows.values():
        store.answers.append([row])
    return rows


def test_small_parts_are_merged_when_they_are_collected(store: FeedbackTables, tmp_path: Path) -> None:
    rows = small_parts(store)
    before = {row["answer_id"]: row for row in store.answers.rows()}
    opinions = store.opinions.parts()
    collect(store.uri, str(tmp_path / "live"))
    assert len(store.answers.files()) == 1
    assert store.opinions.parts() == opinions, "there are few"
    assert {row["answer_id"]: row for row in store.answers.rows()} == before
    assert rows.keys() < before.keys()


def test_answers_of_one_id_keep_their_times_when_they_are_merged(store: FeedbackTables) -> None:
    small_parts(store)
    store.answers.append([answer("n3", "query 3", "A prompt.", time=9000.0), answer("z", None, "A dog.")])
    store.merge()
    store.forget(before=8000.0)
    assert [(row["answer_id"], row["time"]) for row in store.answers.rows()] == [("n3", 9000.0)]


@pytest.mark.parametrize("given", [{"key": "studio"}, {"answer_id": "n3"}, {"before": 3004.0}])
@pytest.mark.parametrize("when", ["write", "delete"])
def test_what_is_forgotten_while_parts_are_merged_is_gone(
    store: FeedbackTables, monkeypatch: pytest.MonkeyPatch, given: Any, when: str
) -> None:
    small_parts(store)
    write, delete = Table.append, Table.delete

    def forget() -> None:
        monkeypatch.setattr(Table, "append", write)
        monkeypatch.setattr(Table, "delete", delete)
        store.forget(**given)

    def writing(self: Table, rows: Any) -> str:
        forget()
        return write(self, rows)

    def deleting(self: Table, name: str) -> None:
        forget()
        delete(self, name)

    monkeypatch.setattr(
        Table, "append" if when == "write" else "delete", writing if when == "write" else deleting
    )
    store.merge()
    left = {row["answer_id"] for row in store.answers.rows()}
    assert "n3" not in left
    assert ("n9" in left) == ("key" not in given)


def test_what_is_merged_while_it_is_collected_is_read_again(
    store: FeedbackTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, parts = small_parts(store), Table.parts
    monkeypatch.setattr(FeedbackTables, "merge", lambda self: None)

    def listed(self: Table) -> list[str]:
        found = parts(self)
        if self.key == "answer_id":
            # Another merges once this one has listed the parts.
            monkeypatch.setattr(Table, "parts", parts)
            store._merge(store.answers)
        return found

    monkeypatch.setattr(Table, "parts", listed)
    assert collect(store.uri, str(tmp_path / "live"))["answers"] == len(rows) + 4
