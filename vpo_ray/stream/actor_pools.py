"""Actor pools: run a stage over a dataset of FEEDBACK rows, publish what it makes, count it.

A stage is plain Python over rows. Here it gets its replicas, its resources and its bookkeeping:
every batch that leaves a stage is first stored as one part of the stage's table, so that a killed
run goes on behind its last finished batch.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from vpo_ray.engines.chat import Chat, ChatStage, Metered, Usage
from vpo_ray.engines.chat.images import ShownImages
from vpo_ray.engines.results import ResultsError, one_for_each
from vpo_ray.files.folder import StorageError
from vpo_ray.lifetime import bind_worker
from vpo_ray.recipe import Pool
from vpo_ray.records import Row, failed, table
from vpo_ray.storage.tables import Table
from vpo_ray.stream.progress import Progress, StageMetrics, beside_driver
from vpo_ray.stream.ray_compat import repartition
from vpo_ray.stream.stops import STOP, ends_run, is_stopped, stopped, stored, stream_block
from vpo_ray.versions import check_code, code

# What small tasks (reading, splitting) reserve: with whole CPUs, a dozen operators of one stream
# would starve each other and the pools on a small node.
TASK_CPUS = 0.1

# An actor that dies is always replaced; its batch is tried once more, then left to the next pass.
RESTARTS = {"max_restarts": -1, "max_task_retries": 1}


def result_schema(table: Table) -> pa.Schema:
    """What goes back to the driver of a row: its id, its error, and why the run stops there."""
    return pa.schema([table.schema.field(name) for name in (table.key, "error")])


class Stage(Protocol):
    """A stage of whole batches (render, score): which rows it takes, and what it makes of them.

    Attributes:
        warming: a stage loads and compiles its model within `with self.warming():`. The pool puts
            `Outcome.warming` there, so that no row pays for it.
    """

    name: str
    warming: Callable[[], AbstractContextManager[None]]

    def wants(self, row: Row) -> bool: ...

    def __call__(self, rows: list[Row]) -> list[Row]: ...


class SharedClock:
    """Charges a replica's busy time to the rows in it: with n rows at once, each pays 1/n, so that
    the rows' seconds add up to the replica's however much they overlap. Threads may share one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._last = now, now()
        self._active, self._paid, self._paused = 0, 0.0, 0
        self._lock = threading.Lock()

    def enter(self, rows: int = 1) -> float:
        with self._lock:
            self._tick()
            self._active += rows
            return self._paid

    def leave(self, entered: float, rows: int = 1) -> float:
        """Seconds that each of these rows pays."""
        with self._lock:
            self._tick()
            self._active -= rows
            return self._paid - entered

    @contextmanager
    def paused(self) -> Iterator[list[float]]:
        """Time for which no row pays; the list that it yields holds its seconds afterwards."""
        seconds: list[float] = []
        with self._lock:
            self._tick()
            self._paused += 1
            began = self._last
        try:
            yield seconds
        finally:
            with self._lock:
                self._tick()
                self._paused -= 1
                seconds.append(self._last - began)

    def _tick(self) -> None:
        now = self._now()
        if self._active and not self._paused:
            self._paid += (now - self._last) / self._active
        self._last = now


class Outcome:
    """Where a stage's rows go: its table, the progress of the run, the metrics of the node.

    Args:
        stage: the stage's name.
        table: the stage's table.
        progress: handle of the run's `Progress` actor.
        last: the stream ends here; only ids and errors go back to the driver.
        spent: what the run had paid to endpoints before.
    """

    def __init__(
        self, stage: str, table: Table, progress: Any, last: bool = False, spent: float = 0.0
    ) -> None:
        self.stage, self.table, self.progress, self.last = stage, table, progress, last
        self.spent = spent
        self.metrics: StageMetrics | None = None
        self.clock: SharedClock | None = None
        self.code = code()
        self._replica: str | None = None

    def check_code(self) -> None:
        """Raises CodeError in a replica whose node has another code than the driver."""
        check_code(self.code)

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Time in which the replica loads and compiles: reported apart, and paid by no row."""
        assert self.clock is not None
        with self.clock.paused() as seconds:
            yield
        self._metrics().warmed(seconds[0])
        self.progress.add.remote(self.stage, warm_up_s=seconds[0])

    @contextmanager
    def timed(self, rows: int) -> Iterator[list[float]]:
        """Time `rows` rows; the list that it yields holds the seconds of each afterwards."""
        self.clock = self.clock or SharedClock()
        self.progress.add.remote(self.stage, self._name(), started=rows)
        seconds: list[float] = []
        entered = self.clock.enter(rows)
        try:
            yield seconds
        finally:
            seconds.append(self.clock.leave(entered, rows))

    def publish(self, rows: Sequence[Row], done: Sequence[Row]) -> pa.Table:
        """Store the batch with its done rows in place, count them, and pass it on.

        When storage fails, the rows go on as ones that stop the run.
        """
        key = self.table.key
        made = {row[key]: row for row in done}
        out = [made.get(row[key], row) for row in rows]
        try:
            out = self._stored(rows, out)
            done = [row for row in out if row[key] in made]
        except StorageError as error:
            out = [stopped(row, str(error), error) for row in out]
        errors = sum(row["error"] is not None for row in done)
        self._metrics().count(done)
        self.progress.add.remote(
            self.stage,
            self._name(),
            next((row["error"] for row in reversed(done) if row["error"] is not None), None),
            done=len(done),
            errors=errors,
            passed=len(rows) - len(done),
            tokens=sum(((row["usage"] or {}).get(self.stage) or {}).get("completion") or 0 for row in done),
        )
        if not self.last:
            return stream_block(out, self.table.schema)
        result = result_schema(self.table)
        names = [*result.names, STOP.name]
        return stream_block([{name: row.get(name) for name in names} for row in out], result)

    def _stored(self, rows: Sequence[Row], out: list[Row]) -> list[Row]:
        """The rows as they are in the table now: one that does not fit it as it came, with an error."""
        try:
            self.table.append([stored(row) for row in out if not is_stopped(row)])
        except StorageError:
            raise
        except ValueError:
            out = [self._fitting(*pair) for pair in zip(rows, out, strict=True)]
            self.table.append([stored(row) for row in out if not is_stopped(row)])
        return out

    def _fitting(self, before: Row, after: Row) -> Row:
        try:
            table([stored(after)], self.table.schema)
        except ValueError as error:
            return failed(before, self.stage, str(error))
        return after

    def same_rows(self, given: Any, rows: Sequence[Row]) -> list[Row]:
        """What a stage gave, with what it left out of each row. Raises ResultsError for anything but the rows
        in their order."""
        key, name = self.table.key, f"the stage {self.stage}"
        found = one_for_each(given, len(rows), name)
        for before, after in zip(rows, found, strict=True):
            if not isinstance(after, dict) or after.get(key) != before[key]:
                what = type(after).__name__ if not isinstance(after, dict) else "another row"
                raise ResultsError(f"{name} gave {what} in the place of {before[key]}")
        return [{**before, **after} for before, after in zip(rows, found, strict=True)]

    def _name(self) -> str:
        """This process, as the progress knows it; the first time it says that it has begun."""
        if self._replica is None:
            self._replica = uuid.uuid4().hex
            self.progress.add.remote(self.stage, self._replica)
        return self._replica

    def _metrics(self) -> StageMetrics:
        self.metrics = self.metrics or StageMetrics(self.stage)
        return self.metrics

    def charge(self, row: Row, seconds: float, usage: Usage | None = None) -> Row:
        row = {**row, "seconds": {**(row["seconds"] or {}), self.stage: seconds}}
        if usage is not None:
            row["usage"] = {**(row["usage"] or {}), self.stage: asdict(usage)}
        return row


class ChatRunner:
    """A text stage in an async actor: all rows of all its batches at once, a failure to its row.

    Args:
        fatal: errors that leave the engine dead; `leave` is called for them.
        images: those of queries, where the model is shown them.
    """

    def __init__(
        self,
        stage: ChatStage,
        chat: Chat,
        outcome: Outcome,
        fatal: tuple[type[BaseException], ...] = (),
        leave: Callable[[], None] = lambda: None,
        images: ShownImages | None = None,
    ) -> None:
        self.stage, self.chat, self.outcome, self.images = stage, chat, outcome, images
        self.fatal, self.leave = fatal, leave

    async def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        done = await asyncio.gather(*(self._run(row) for row in rows if _takes(self.stage, row)))
        return await asyncio.to_thread(self.outcome.publish, rows, done)

    async def _run(self, row: Row) -> Row:
        chat = Metered(self.chat)
        with self.outcome.timed(1) as seconds:
            done = await self._answer(row, chat)
        return self.outcome.charge(done, seconds[0], chat.usage)

    async def _answer(self, row: Row, chat: Chat) -> Row:
        try:
            self.outcome.check_code()
            if self.images is not None and row.get("image") is not None:
                chat = await asyncio.to_thread(self.images.beside, chat, row["image"])
            return self.outcome.same_rows([await self.stage(row, chat)], [row])[0]
        except self.fatal:
            self.leave()
            raise
        except Exception as error:  # noqa: BLE001  any other failure belongs to its row alone
            if ends_run(error):
                return stopped(row, str(error), error)
            return failed(row, self.stage.name, f"{type(error).__name__}: {error}")


class StageActor:
    """One replica of a batch stage."""

    def __init__(self, stage: Callable[[], Stage], outcome: Outcome) -> None:
        bind_worker()
        self.stage, self.outcome = stage(), outcome
        # Made here and not at first use: the first calls of a replica may come at the same time.
        self.outcome.clock = SharedClock()
        self.stage.warming = self.outcome.warming

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        wanted = [row for row in rows if _takes(self.stage, row)]
        done: list[Row] = []
        if wanted:
            with self.outcome.timed(len(wanted)) as seconds:
                try:
                    self.outcome.check_code()
                    done = self.outcome.same_rows(self.stage(wanted), wanted)
                except Exception as error:  # noqa: BLE001  a stage's failure belongs to its batch
                    reason = f"{type(error).__name__}: {error}"
                    ends = ends_run(error)
                    done = [
                        stopped(row, reason, error) if ends else failed(row, self.stage.name, reason)
                        for row in wanted
                    ]
            done = [self.outcome.charge(row, seconds[0]) for row in done]
        return self.outcome.publish(rows, done)


def _takes(stage: Stage | ChatStage, row: Row) -> bool:
    return not is_stopped(row) and stage.wants(row)


def of_stage(actor: type, stage: str) -> type:
    """An actor's class under its stage's name, as `ps`, `ray list actors` and dashboards show it."""
    return type(stage, (actor,), {})


def batch_pool(
    dataset: Dataset,
    pool: Pool,
    *,
    stage: Callable[[], Stage],
    outcome: Outcome,
    batch_size: int,
    one_at_a_time: bool = False,
    calls: int = 1,
) -> Dataset:
    """Run a batch stage over a dataset of FEEDBACK rows whose blocks have `batch_size` rows.

    Args:
        one_at_a_time: give a replica one batch at a time, so that one that kills it kills no other.
        calls: batches that one replica works on at once, for stages whose calls may overlap.
    """
    calls = 1 if one_at_a_time else calls
    return dataset.map_batches(
        of_stage(StageActor, outcome.stage),
        fn_constructor_kwargs={"stage": stage, "outcome": outcome},
        batch_size=batch_size,
        batch_format="pyarrow",
        # One more than are worked on: the replica never waits for the driver, and none hoards rows.
        compute=ActorPoolStrategy(
            min_size=pool.size[0],
            max_size=pool.size[1],
            max_tasks_in_flight_per_actor=calls if one_at_a_time else calls + 1,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        accelerator_type=pool.accelerator_type,
        resources=pool.resources or None,
        label_selector=pool.labels or None,
        **RESTARTS,
    )


def split_blocks(dataset: Dataset, rows: int) -> Dataset:
    """Blocks of at most `rows` rows, so that a slow stage's replicas share the work evenly."""
    return repartition(dataset, rows, TASK_CPUS)


def progress_handle(stages: Sequence[str], spent: float = 0.0, book: tuple[str, str] | None = None) -> Any:
    """Start the actor that counts rows and money."""
    return beside_driver(Progress, list(stages), spent, book)
