"""Merging a table's parts: whatever it dies at, a reader sees each row once, and the next call ends it."""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table

SMALL = {"fewest": 2, "rows_per_part": 5}


@pytest.fixture(autouse=True, scope="module")
def _no_power_cuts() -> Iterator[None]:
    """Thousands of files are written, of which none has to be on the disk at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def row(name: str, error: str | None = None) -> Row:
    return {
        "candidate_id": name,
        "query_id": "q",
        "query": "a cat",
        "k": 0,
        "seed": 0,
        "prompt": f"shown: {name}",
        "error": error,
    }


def filled(folder: Path, parts: int = 7) -> Table:
    table = RunDir(folder).table("renders")
    for number in range(parts):
        table.append([row(f"{number}a"), row(f"{number}b")])
    return table


def stored(table: Table) -> Counter[str]:
    """Every row as it lies in the parts: one that is there twice counts twice."""
    return Counter(key for batch in table.batches(["candidate_id"]) for key in batch[0].to_pylist())


class Killed(BaseException):
    """No handler of ours may swallow it."""


class Fuse:
    """Kills at the n-th change of the filesystem, before it or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, after: bool = False) -> None:
        self.calls, self.at, self.after = 0, at, after
        self.thread = threading.get_ident()  # what heartbeats of other tests write is not of this one
        for name in ("write", "delete"):
            monkeypatch.setattr(Folder, name, self._wrapped(getattr(Folder, name)))

    def _wrapped(self, method: Any) -> Any:
        def call(folder: Folder, *arguments: Any) -> Any:
            if threading.get_ident() != self.thread:
                return method(folder, *arguments)
            self.calls += 1
            if self.calls - 1 == self.at and not self.after:
                raise Killed
            result = method(folder, *arguments)
            if self.calls - 1 == self.at:
                raise Killed
            return result

        return call


def changes(folder: Path) -> int:
    table = filled(folder)
    with pytest.MonkeyPatch.context() as patch:
        fuse = Fuse(patch)
        assert table.compact(**SMALL) == 7
    return fuse.calls


def test_parts_become_few(tmp_path: Path) -> None:
    table = filled(tmp_path)
    before = sorted(table.rows(), key=lambda r: r["candidate_id"])
    assert table.compact(fewest=8) == 0
    assert len(table.parts()) == 7
    assert table.compact(fewest=2, rows_per_part=100) == 7
    [part] = table.parts()
    assert part.endswith("-14.parquet")
    assert sorted(table.rows(), key=lambda r: r["candidate_id"]) == before
    assert (table.files(), table._meta().files()) == ([part], []), "nothing else is left"
    assert table.compact(fewest=2) == 0
    assert table.parts() == [part]


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_change_hides_and_doubles_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    undisturbed = filled(tmp_path / "whole")
    undisturbed.compact(**SMALL)
    count = changes(tmp_path / "count")
    assert count > 7
    for at in range(count):
        table = filled(tmp_path / f"killed {at}")
        expected = stored(table)
        with monkeypatch.context() as patch:
            Fuse(patch, at, after)
            with pytest.raises(Killed):
                table.compact(**SMALL)
        assert stored(table) == expected, at
        # A run that goes on appends at once; a part may come again under its old name.
        table.clear_merged()
        assert stored(table) == expected, at
        table.append([row("0a"), row("0b")])
        table.append([row("new")])
        assert table.keys() == expected.keys() | {"new"}
        table.compact(**SMALL)
        assert table.keys() == expected.keys() | {"new"}
        assert all(name.endswith(".parquet") for name in table.files())
        assert table._meta().files() == []
    assert stored(undisturbed) == expected


def test_a_kill_while_clearing_away_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = changes(tmp_path / "count")
    for first, second in itertools.product((2, count - 4), range(3)):
        table = filled(tmp_path / f"{first} {second}")
        expected = stored(table)
        for at in (first, second):
            with monkeypatch.context() as patch:
                Fuse(patch, at)
                with pytest.raises(Killed):
                    table.compact(**SMALL)
            assert stored(table) == expected
        table.compact(**SMALL)
        assert stored(table) == expected
        assert len(table.parts()) < 7


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(tmp_path)
    expected, write = stored(table), Table._write_part

    def full(self: Table, name: str, rows: Any) -> None:
        write(self, name, rows)
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "_write_part", full)
        with pytest.raises(StorageError):
            table.compact(**SMALL)
    assert stored(table) == expected
    table.compact(**SMALL)
    assert stored(table) == expected


def test_a_row_that_was_tried_again_after_a_merge_wins(tmp_path: Path) -> None:
    """Its part has the name of one that was merged; it must neither be hidden nor taken for the merged."""
    table = RunDir(tmp_path).table("renders")
    for name in "abc":
        table.append([row(name, error="boom")])
    table.compact(**SMALL)
    for name in "abc":
        table.append([row(name)])
    assert {r["error"] for r in table.rows()} == {None}
    table.compact(**SMALL)
    assert stored(table) == Counter("abc")
    assert {r["error"] for r in table.rows()} == {None}
    for name in "abc":
        table.append([row(name, error="again")])
    table.compact(**SMALL)
    assert {r["error"] for r in table.rows()} == {None}


def test_a_merged_part_of_full_size_is_left_alone(tmp_path: Path) -> None:
    table = filled(tmp_path)
    table.compact(fewest=2, rows_per_part=14)
    [full] = table.parts()
    for name in "xyz":
        table.append([row(name)])
    assert table.compact(fewest=2, rows_per_part=14) == 3
    assert full in table.parts()
    assert len(table.parts()) == 2


def test_a_reader_of_a_damaged_marker_is_told(tmp_path: Path) -> None:
    table = filled(tmp_path)
    table.write("compacting.json", b"")
    with pytest.raises(StorageError, match=r"compacting\.json is damaged"):
        table.parts()


@pytest.mark.parametrize("switched", [False, True])
def test_what_an_earlier_version_left_while_merging_is_cleared_away(tmp_path: Path, switched: bool) -> None:
    """Its one marker hid the merged part while that was written, then the parts that are in it."""
    table = filled(tmp_path)
    small, expected = table.parts(), stored(table)
    merged = "0123abcd-14.parquet"
    table._write_part(merged, pa.Table.from_batches(table.batches(), table.schema))
    table.write_json("compacting.json", small if switched else [merged])
    assert stored(table) == expected
    table.clear_merged()
    assert stored(table) == expected
    assert table.files() == ([merged] if switched else small)


class Turns:
    """Lets two compactions of one table run in turns: a thread waits before each change of a file."""

    def __init__(self, patch: pytest.MonkeyPatch, table: Table) -> None:
        self.table, self.lock = table, threading.Condition()
        self.left = {"one": 0, "other": 0}
        self.waiting = {"one": False, "other": False}
        self.errors: list[Exception] = []
        for name in ("write", "delete"):
            patch.setattr(Folder, name, self._wrapped(getattr(Folder, name)))
        self.threads = {
            name: threading.Thread(target=self._run, name=name, daemon=True) for name in ("one", "other")
        }

    def go(self, name: str, steps: int) -> None:
        """Let one of them change so many files, or come to its end."""
        with self.lock:
            self.left[name], self.waiting[name] = steps, False
            self.lock.notify_all()
        thread = self.threads[name]
        if not thread.ident:
            thread.start()
        with self.lock:
            assert self.lock.wait_for(lambda: self.waiting[name] or not thread.is_alive(), 20)

    def _run(self) -> None:
        try:
            self.table.compact(**SMALL)
        except StorageError as error:
            self.errors.append(error)  # a part that it listed is merged by now: nothing is lost
        with self.lock:
            self.waiting[threading.current_thread().name] = True
            self.lock.notify_all()

    def _wrapped(self, method: Any) -> Any:
        def call(folder: Folder, *arguments: Any) -> Any:
            name = threading.current_thread().name
            if name in self.left:
                with self.lock:
                    if not self.left[name]:
                        self.waiting[name] = True
                        self.lock.notify_all()
                    assert self.lock.wait_for(lambda: self.left[name] > 0, 20)
                    self.left[name] -= 1
            return method(folder, *arguments)

        return call


@pytest.mark.parametrize("appends", [False, True])
def test_two_drivers_that_merge_at_once_lose_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appends: bool
) -> None:
    """One is frozen after any number of changes, the other goes on as far as it likes, the first thaws."""
    for first, second in itertools.product((0, 1, 2, 3, 5), (0, 3, 7)):
        table = filled(tmp_path / f"{first} {second}", parts=4)
        expected = set(table.keys())
        with monkeypatch.context() as patch:
            turns = Turns(patch, table)
            turns.go("one", first)
            if appends:  # what the first may have listed comes back, and something new
                table.append([row("0a"), row("0b")])
                table.append([row("1a", error="boom"), row("1b", error="boom")])
                table.append([row("new")])
                expected |= {"new"}
            turns.go("other", second)
            assert table.keys() == expected, (first, second)
            turns.go("one", 1000)
            assert table.keys() == expected, (first, second)
            turns.go("other", 1000)
        assert {r["candidate_id"]: r["error"] for r in table.rows()} == dict.fromkeys(expected)
        table.compact(**SMALL)
        assert {r["candidate_id"]: r["error"] for r in table.rows()} == dict.fromkeys(expected)


@pytest.mark.parametrize("again", ["error", "skipped"])
def test_a_batch_that_fails_when_it_is_done_again_takes_no_good_row_away(tmp_path: Path, again: str) -> None:
    table = RunDir(tmp_path).table("renders")
    good, failed = [row("a"), row("b")], [row("a"), {**row("b"), again: "boom"}]
    for batch in (good, failed, good, failed):
        table.append(batch)
    assert len(table.parts()) == 2, "the same rows again are one part"
    for _ in range(2):
        assert {(r["candidate_id"], r["error"], r["skipped"]) for r in table.rows()} == {
            ("a", None, None),
            ("b", None, None),
        }
        assert table.count() == 2
        table.compact(fewest=1)
    table.append([{**row("c"), "skipped": "not needed"}])
    table.append([row("c", error="boom")])
    assert {r["candidate_id"]: r["skipped"] for r in table.rows()}["c"] == "not needed"


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.just("compact"),
            st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), min_size=1, max_size=3),
        ),
        max_size=12,
    )
)
def test_appends_and_merges_in_any_order_keep_each_key_and_its_best_row(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    """The model: each part's rows, of which the same keys with the same outcomes replace the part."""
    table = RunDir(tmp_path_factory.mktemp("run")).table("renders")
    parts: dict[Any, dict[str, bool]] = {}

    def expected() -> dict[str, bool]:
        names = {name for rows in parts.values() for name in rows}
        return {name: any(rows.get(name, False) for rows in parts.values()) for name in names}

    for step in steps:
        if step == "compact":
            table.compact(fewest=1, rows_per_part=4)
            parts = {"merged": expected()}
        else:
            rows = dict(step)
            table.append([row(name, None if ok else "boom") for name, ok in rows.items()])
            parts[frozenset(rows.items())] = rows
        assert {r["candidate_id"]: r["error"] is None for r in table.rows()} == expected()
    table.compact(fewest=1, rows_per_part=100)
    assert {r["candidate_id"]: r["error"] is None for r in table.rows()} == expected()
