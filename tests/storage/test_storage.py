"""A file appears whole or not at all, a table holds each key once, and every failure names its path."""

import errno
import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.files.folder import Folder, StorageError, chunks
from vpo_ray.records import FEEDBACK, Row
from vpo_ray.storage.model_cache import _write_durably
from vpo_ray.storage.run_dir import TABLES, RunDir
from vpo_ray.storage.tables import PARTS_AT_ONCE, Table

ODD_NAMES = ["plain", "with space", "a#b%20c?d", "ünï-中", "[x]{y}"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def query(name: str, text: str = "a cat", split: str = "dpo") -> Row:
    return {"query_id": name, "query": text, "split": split}


def candidate(name: str, error: str | None = None, **more: Any) -> Row:
    return {
        "candidate_id": name, "query_id": "q", "query": "a cat", "k": 0, "seed": 0, "error": error, **more
    }  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*.tmp")]


# Files


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / name)
    data = "é 中 \U0001f600 \u2028\r\n\x00".encode()
    folder.write(f"deep/{name}.bin", data)
    assert folder.read(f"deep/{name}.bin") == data
    assert (tmp_path / name / "deep" / f"{name}.bin").read_bytes() == data
    assert folder.files() == [f"deep/{name}.bin"]
    assert (folder / "deep").files(".bin") == [f"{name}.bin"]
    assert folder.exists(f"deep/{name}.bin")
    assert not folder.exists("deep")
    assert not folder.exists(f"deep/{name}.bin/x")


def test_json_keeps_text_readable(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    value = {"b": "中 \U0001f600", "a": [1, 2.5, None]}
    folder.write_json("x.json", value)
    assert folder.read_json("x.json") == value
    assert "中" in (tmp_path / "x.json").read_text("utf-8")


def test_no_folder_holds_no_files(tmp_path: Path) -> None:
    assert Folder(tmp_path / "none").files() == []
    with pytest.raises(FileNotFoundError):
        Folder(tmp_path / "none").read("x")


def test_a_file_uri_is_the_same_folder(tmp_path: Path) -> None:
    Folder(tmp_path).write("x", b"1")
    assert Folder(f"file://{tmp_path}/").read("x") == b"1"


def test_a_write_that_fails_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    folder = Folder(tmp_path)
    for name in ("file/below", "file/a/b", "folder"):
        with pytest.raises(StorageError) as caught:
            folder.write(name, b"new")
        assert f"cannot write {tmp_path}/{name}" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on file size is the full disk that a test may have."""
    import resource
    import signal

    folder = Folder(tmp_path)
    folder.write("x", b"old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            folder.write("x", b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.read("x") == b"old"
    assert leftovers(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves the old file or the new one, and the folders that lead to it."""
    flushed: list[tuple[str, bool]] = []
    target, flush = tmp_path / "deep/er/x", os.fsync

    def note(file: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{file}"), target.exists()))
        flush(file)

    monkeypatch.setattr(os, "fsync", note)
    Folder(tmp_path).write("deep/er/x", b"1")
    folders, [(aside, named), last] = flushed[:2], flushed[2:]
    assert folders == [(str(tmp_path), False), (str(tmp_path / "deep"), False)]
    assert aside.startswith(f"{target.parent}/.{target.name}.")
    assert not named
    assert last == (str(target.parent), True)


def test_a_filesystem_that_flushes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some that are shared over a network do not."""
    flush = os.fsync

    def files_only(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(file)

    monkeypatch.setattr(os, "fsync", files_only)
    folder = Folder(tmp_path)
    folder.write("deep/er/x", b"1")
    assert folder.read("deep/er/x") == b"1"
    _write_durably(tmp_path / "y", tmp_path / "y.part", b"2")
    assert folder.read("y") == b"2"


def test_a_disk_that_is_full_when_a_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write("x", b"old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            folder.write("x", b"new")
    assert (folder.files(), folder.read("x")) == (["x"], b"old")


@pytest.mark.usefixtures("as_a_user")
def test_a_folder_without_access(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        Folder(tmp_path).write("x", b"1")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("uri", ["s4://bucket/run", "ftp://host/x"])
def test_a_filesystem_that_nobody_knows(uri: str) -> None:
    with pytest.raises(StorageError, match=f"cannot open {uri}"):
        Folder(uri)


def test_the_home_of_nobody() -> None:
    with pytest.raises(StorageError, match="~nobody-is-called-so/run: nobody here has such a home"):
        Folder("~nobody-is-called-so/run")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "queries").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot list {tmp_path}/queries"):
        RunDir(tmp_path).table("queries").count()


def test_folders_and_tables_travel_to_workers(run: RunDir) -> None:
    table = run.table("queries")
    table.append([query("a")])
    assert pickle.loads(pickle.dumps(run)).uri == run.uri
    again: Table = pickle.loads(pickle.dumps(table))
    assert (again.schema, again.key) == (table.schema, table.key)
    assert list(again.rows()) == list(table.rows())


def test_metrics_of_a_phase(run: RunDir) -> None:
    assert run.metrics("sft") == []
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}]
    run.write_metrics("sft", lines)
    assert run.metrics("sft") == lines


# Tables


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_key_in_its_schema(run: RunDir, name: str) -> None:
    schema, key = TABLES[name]
    assert not schema.field(key).nullable
    assert (list(run.table(name).rows()), run.table(name).count()) == ([], 0)


def test_rows_come_back_whole(run: RunDir) -> None:
    row = candidate(
        "a",
        prompt="中\r\n\x00 \U0001f600",
        answers=[{"question": 1, "yes": True, "probability": 0.5}],
        dimensions=[{"name": "alignment", "score": 1.5}],
        seconds={"sample": 1.0, "judge": None, "render": None, "score": None},
    )
    run.table("feedback").append([row])
    assert list(run.table("feedback").rows()) == [{name: row.get(name) for name in FEEDBACK.names}]
    assert list(run.table("feedback").rows(["prompt"])) == [{"prompt": row["prompt"]}]


def test_the_same_rows_twice_are_one_part(run: RunDir) -> None:
    table = run.table("queries")
    first = table.append([query("a"), query("b")])
    assert table.append([query("b"), query("a")]) == first
    assert table.parts() == [first]
    assert table.append([query("a")]) != first
    assert table.count() == 2
    assert len(list(table.rows())) == 2
    assert table.append([]) == ""


def test_a_row_that_does_not_fit_writes_nothing(run: RunDir) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        run.table("queries").append([query("a"), {**query("b"), "unsafe": "yes"}])
    assert run.table("queries").parts() == []


@pytest.mark.parametrize("order", list(itertools.permutations(("error", "good", "other error"))))
def test_a_row_without_error_wins_whatever_the_order(run: RunDir, order: tuple[str, ...]) -> None:
    """Parts are read by name, and names are hashes: the retried row may come first or last."""
    parts = {
        "error": candidate("a", error="boom"),
        "good": candidate("a", prompt="fine"),
        "other error": candidate("a", error="bang"),
    }
    table = run.table("candidates")
    for position, name in enumerate(order):
        # A second row, other each time, gives the part another name.
        table.append([parts[name], candidate(f"filler {position}")])
    stored = {row["candidate_id"]: row for row in table.rows(["candidate_id", "prompt", "error"])}
    assert stored["a"] == {"candidate_id": "a", "prompt": "fine", "error": None}
    assert len(list(table.rows())) == table.count() == 4


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1), max_size=5))
def test_each_key_once_and_good_where_ever_good(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[tuple[str, bool]]]
) -> None:
    table = RunDir(tmp_path_factory.mktemp("run")).table("candidates")
    for number, part in enumerate(parts):
        rows = [candidate(name, error="boom" if bad else None) for name, bad in part]
        table.append([*rows, candidate(f"filler {number}")])
    found = [(row["candidate_id"], row["error"]) for row in table.rows(["candidate_id", "error"])]
    stored = [entry for part in parts for entry in part]
    names = {name for name, _ in stored}
    assert sorted(found) == sorted(
        [(name, None if (name, False) in stored else "boom") for name in names]
        + [(f"filler {number}", None) for number in range(len(parts))]
    )


def test_rows_and_keys_by_condition(run: RunDir) -> None:
    table = run.table("candidates")
    table.append([candidate("a"), candidate("b", error="boom")])
    assert table.keys() == {"a", "b"}
    assert table.keys(pc.field("error").is_null()) == {"a"}
    assert [row["candidate_id"] for row in table.rows(where=pc.field("error").is_valid())] == ["b"]


@pytest.mark.parametrize("before", [[], ["a"], ["a", "b", "c"], ["x", "y"]])
@pytest.mark.parametrize("after", [[], ["a"], ["b", "a"], ["c", "d", "e"]])
def test_replace_leaves_exactly_the_new_rows(run: RunDir, before: list[str], after: list[str]) -> None:
    table = run.table("queries")
    table.replace((query(name, "old") for name in before), rows_per_part=2)
    assert table.replace((query(name, "new") for name in after), rows_per_part=2) == len(after)
    assert sorted(row["query_id"] for row in table.rows()) == sorted(after)
    assert {row["query"] for row in table.rows()} <= {"new"}
    assert len(table.parts()) == -(-len(after) // 2)


def test_replace_after_a_kill_in_the_middle_mends_the_table(run: RunDir) -> None:
    table = run.table("queries")
    table.replace([query("a"), query("b")])

    def killed() -> Iterator[Row]:
        yield query("c")
        yield query("d")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.replace(killed(), rows_per_part=1)
    assert {"a", "b"} <= table.keys()
    table.replace([query("c"), query("d")], rows_per_part=1)
    assert table.keys() == {"c", "d"}


def test_an_interrupted_write_is_no_part(run: RunDir) -> None:
    table = run.table("queries")
    part = table.append([query("a")])
    Path(f"{table.path}/{part}.0123.tmp").write_bytes(b"half")
    assert table.parts() == [part]
    assert table.keys() == {"a"}


# Damage


def part_of(table: Table) -> Path:
    table.append([query("a", "a cat " * 20)])
    return Path(table.path) / table.parts()[0]


@pytest.mark.parametrize("keep", [0, 3, 10, 0.5, -1])
def test_a_truncated_part_is_named(run: RunDir, keep: float) -> None:
    part = part_of(run.table("queries"))
    data = part.read_bytes()
    part.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(StorageError, match="queries"):
        list(run.table("queries").rows())


def test_a_damaged_part_is_a_storage_error_or_harmless(run: RunDir) -> None:
    """Any single damaged byte: an error that says where, never another exception."""
    part = part_of(run.table("queries"))
    data = part.read_bytes()
    errors = 0
    for position in range(0, len(data), 7):
        part.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            list(run.table("queries").rows())
        except StorageError:
            errors += 1
    assert errors > 100


@pytest.mark.parametrize(
    "columns",
    [
        {"other": [1]},
        {"query_id": ["a"]},
        {"query_id": ["a"], "query": [None], "split": ["dpo"]},
        {"query_id": [["a"]], "query": ["a cat"], "split": ["dpo"]},
        {"query_id": ["a"], "query": ["a cat"], "split": ["dpo"], "unsafe": ["maybe"]},
    ],
)
def test_a_part_of_another_table_is_refused(run: RunDir, columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(columns), part_of(run.table("queries")))
    with pytest.raises(StorageError, match="queries"):
        list(run.table("queries").rows())


def test_a_part_that_vanished_is_named(run: RunDir) -> None:
    table = run.table("queries")
    with pytest.raises(StorageError, match=r"gone\.parquet"):
        list(table.batches(parts=["gone.parquet"]))


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 7))
def test_chunks_keep_every_row_in_order(count: int, size: int) -> None:
    rows = [{"row": number} for number in range(count)]
    parts = list(chunks(iter(rows), size))
    assert [row for part in parts for row in part] == rows
    assert all(len(part) == size for part in parts[:-1])
    assert all(parts)


def test_memory_does_not_grow_with_the_number_of_parts(run: RunDir) -> None:
    """A stream leaves a part for each render: a hundred thousand are read before they are merged."""

    def resident() -> int:
        """MB of this process."""
        return psutil.Process().memory_info().rss >> 20

    table = run.table("feedback")
    part = Path(table.path, table.append([candidate("a")]))
    for number in range(2000):
        os.link(part, part.with_name(f"{number}.parquet"))
    assert (
        sum(batch.num_rows for batch in table.batches(parts=table.parts()[:PARTS_AT_ONCE])) == PARTS_AT_ONCE
    )
    before = resident()
    assert sum(batch.num_rows for batch in table.batches()) == 2001
    assert resident() - before < 100


def test_what_a_copy_by_macos_leaves_beside_parts_is_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    part = run.table("pairs").append([{**dict.fromkeys(TABLES["pairs"][0].names, "x"), "margin": 0.5}])
    (tmp_path / f"pairs/._{part}").write_bytes(b"Mac OS X")
    assert run.table("pairs").parts() == [part]
    assert run.table("pairs").count() == 1
