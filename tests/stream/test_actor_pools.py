"""The arithmetic of busy time and of the status table; pools themselves are tested with Ray."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.records import Row, table
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.actor_pools import Outcome, SharedClock, StageActor


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_row_pays_its_own_time() -> None:
    time = Time()
    clock = SharedClock(time)
    time.now += 5
    entered = clock.enter()
    time.now += 3
    assert clock.leave(entered) == pytest.approx(3)


def test_idle_time_is_paid_by_nobody() -> None:
    time = Time()
    clock = SharedClock(time)
    clock.leave(clock.enter())
    time.now += 1000
    entered = clock.enter()
    time.now += 1
    assert clock.leave(entered) == pytest.approx(1)


def test_rows_that_overlap_share_the_time() -> None:
    time = Time()
    clock = SharedClock(time)
    first = clock.enter()
    time.now += 2
    second = clock.enter()
    time.now += 4
    assert clock.leave(first) == pytest.approx(2 + 4 / 2)
    time.now += 1
    assert clock.leave(second) == pytest.approx(4 / 2 + 1)


def test_nobody_pays_for_warming_up() -> None:
    time = Time()
    clock = SharedClock(time)
    first = clock.enter()
    time.now += 2
    with clock.paused() as warm_up:
        time.now += 60
        second = clock.enter()
        time.now += 30
    time.now += 4
    assert warm_up == [pytest.approx(90)]
    assert clock.leave(first) == pytest.approx(2 + 4 / 2)
    assert clock.leave(second) == pytest.approx(4 / 2)


def test_a_batch_pays_by_row() -> None:
    time = Time()
    clock = SharedClock(time)
    entered = clock.enter(rows=4)
    time.now += 8
    assert clock.leave(entered, rows=4) == pytest.approx(2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 10), st.floats(0, 10)), max_size=12), st.integers())
def test_what_rows_pay_adds_up_to_the_busy_time(batches: list[tuple[int, float, float]], seed: int) -> None:
    """Batches of `rows` rows that begin after a pause and last a while, overlapping as they will."""
    time = Time()
    clock = SharedClock(time)
    begin = 100.0
    events: list[tuple[float, int, int]] = []
    for number, (rows, pause, lasts) in enumerate(batches):
        begin += pause
        events += [(begin, number, rows), (begin + lasts, number, -rows)]
    random.Random(seed).shuffle(events)
    events.sort(key=lambda event: (event[0], -event[2]))
    entered: dict[int, float] = {}
    paid = busy = 0.0
    active = 0
    for at, number, rows in events:
        busy += (at - time.now) if active else 0.0
        time.now = at
        active += rows
        if rows > 0:
            entered[number] = clock.enter(rows)
        else:
            seconds = clock.leave(entered[number], -rows)
            assert seconds >= -1e-9
            paid += seconds * -rows
    assert paid == pytest.approx(busy, abs=1e-6)


def test_a_replica_with_another_code_makes_nothing(tmp_path: Path) -> None:
    class Pass:
        name, warming = "render", nullcontext

        def wants(self, row: Row) -> bool:
            return True

        def __call__(self, rows: list[Row]) -> list[Row]:
            return rows

    stored = RunDir(tmp_path).table("renders")
    ids = {"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 0}
    row = dict.fromkeys(stored.schema.names) | ids
    outcome = Outcome("render", stored, Mock())
    assert len(StageActor(Pass, outcome)(table([row], stored.schema))) == 1
    assert stored.count() == 1
    outcome.code = "another"
    [stopped] = StageActor(Pass, outcome)(table([row | {"candidate_id": "d"}], stored.schema)).to_pylist()
    assert stopped["error"] is None
    assert "the driver has another: give every node the same image" in stopped["stop"]["reason"]
    assert stored.count() == 1, "the next run takes the row again"


def rows_of(schema: pa.Schema, *ids: str) -> list[Row]:
    known = {"query_id": "q", "query": "a cat", "k": 0, "seed": 0}
    return [dict.fromkeys(schema.names) | known | {"candidate_id": name} for name in ids]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda rows: None, "the stage render gave NoneType, and not a list of 2 results"),
        (lambda rows: rows[:1], "the stage render gave 1 results for 2"),
        (lambda rows: [None, rows[1]], "the stage render gave NoneType in the place of a"),
        (lambda rows: rows[::-1], "the stage render gave another row in the place of a"),
    ],
)
def test_a_stage_that_gives_other_rows_is_told_of_them(
    tmp_path: Path, make: Callable[[list[Row]], Any], says: str
) -> None:
    stored, out = through(tmp_path, make)
    assert [row["error_stage"] for row in stored] == ["render", "render"]
    assert all(says in row["error"] for row in (*stored, *out))


def test_a_row_that_fits_no_table_costs_no_other(tmp_path: Path) -> None:
    wrong = ({"frames": "many"}, {"frames": 2**40}, {"generator": "\ud800"}, {"unheard_of": 1})
    for number, columns in enumerate(wrong):
        change = partial(_changed, columns)
        stored, out = through(tmp_path / str(number), change)
        assert [row["frames"] for row in stored] == [None, 9]
        assert [row["error_stage"] for row in stored] == ["render", None]
        assert stored[0]["query"] == "a cat"
        assert out[0]["error"] == stored[0]["error"]


def _changed(columns: Row, rows: list[Row]) -> list[Row]:
    return [rows[0] | columns, rows[1] | {"frames": 9}]


def test_what_a_stage_leaves_out_of_a_row_is_kept(tmp_path: Path) -> None:
    stored, _ = through(
        tmp_path, lambda rows: [{"candidate_id": r["candidate_id"], "frames": 9} for r in rows]
    )
    assert [(row["query"], row["frames"], row["error"]) for row in stored] == [("a cat", 9, None)] * 2


def through(folder: Path, make: Callable[[list[Row]], Any]) -> tuple[list[Row], list[Row]]:
    """Two rows through a batch stage that gives this: as they are stored, and as they go on."""

    class Gives:
        name, warming = "render", nullcontext

        def wants(self, row: Row) -> bool:
            return True

        def __call__(self, rows: list[Row]) -> Any:
            return make(rows)

    kept = RunDir(folder).table("renders")
    actor = StageActor(Gives, Outcome("render", kept, Mock()))
    out = actor(table(rows_of(kept.schema, "a", "b"), kept.schema)).to_pylist()
    return sorted(kept.rows(), key=lambda row: row["candidate_id"]), out
