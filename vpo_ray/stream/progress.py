"""What a run counts while it works: rows by stage, steps of a training; as Ray metrics, too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from vpo_ray.metrics import STAGES
from vpo_ray.records import Row
from vpo_ray.stream import ray_compat
from vpo_ray.stream.spending import Book, Charges

logger = logging.getLogger(__name__)

COUNTS = ("started", "done", "errors", "passed", "warm_up_s", "tokens")


class Busy:
    """How long the replicas of a pool have been there, and had rows; seconds of all of them."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, now()
        self._rows: dict[str, int] = {}
        self.busy_s = self.there_s = 0.0

    def change(self, replica: str, rows: int) -> None:
        """A replica took rows up, or (negative) gave them back; with 0 it has begun, and has none."""
        self.tick()
        self._rows[replica] = max(0, self._rows.get(replica, 0) + rows) if rows else 0

    @property
    def in_flight(self) -> int:
        return sum(self._rows.values())

    def tick(self) -> None:
        gone, self._last = self._now() - self._last, self._now()
        self.there_s += gone * len(self._rows)
        self.busy_s += gone * sum(1 for rows in self._rows.values() if rows)


class Progress:
    """Counts of rows by stage: taken up, finished, failed, and passed on untouched; the seconds that
    its replicas took to warm up; and the money that went to endpoints, `spent` before this execution.

    Args:
        book: where this execution enters what it pays; see `spending.Book`.
    """

    def __init__(
        self, stages: Sequence[str], spent: float = 0.0, book: tuple[str, str] | None = None
    ) -> None:
        self._spent = spent
        self._book = Book(*book) if book is not None else None
        self._counts: dict[str, dict[str, Any]] = {stage: dict.fromkeys(COUNTS, 0) for stage in stages}
        self._busy = {stage: Busy() for stage in stages}

    def add(self, stage: str, replica: str = "", reason: str | None = None, **counts: float) -> None:
        """Counts of a stage.

        Args:
            replica: whose rows these are; one that names itself without counts has begun.
            reason: of the last error.
        """
        for name, count in counts.items():
            self._counts[stage][name] += count
        if reason is not None:
            self._counts[stage]["reason"] = reason
        if replica:
            left = counts.get("done", 0)
            if left or "started" in counts or not counts:
                self._busy[stage].change(replica, int(counts.get("started", 0) - left))

    async def charge(self, stage: str, charge: Charges) -> float:
        """Enter what an endpoint took; returns all that the run has paid so far.

        Raises:
            StorageError: the account cannot be written or read.
        """
        self._spent += charge.cost
        if self._book is None:
            return self._spent
        await self._book.enter(stage, charge)
        return self._spent + await self._book.paid_by_others()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """The counts of every stage; and of its replicas rows `in_flight`, `busy_s` and `there_s`."""
        found = {}
        for stage, busy in self._busy.items():
            busy.tick()
            of_pool = {"in_flight": busy.in_flight, "busy_s": busy.busy_s, "there_s": busy.there_s}
            found[stage] = {**self._counts[stage], **of_pool}
        return found

    def paid(self) -> float:
        """What the run has paid to endpoints, as far as this execution knows."""
        return self._spent


class Steps:
    """What rank 0 of a training tells of it."""

    def __init__(self) -> None:
        self._told: Row = {"doing": "starting workers", "learnt": 0}

    def tell(self, **facts: Any) -> None:
        self._told.update(facts)
        self._told["learnt"] += facts.get("tokens", 0)

    def told(self) -> Row:
        return self._told


def beside_driver(kind: type, *arguments: Any) -> Any:
    """An actor on the driver's node that lives as long as its handle: anywhere else it could go with a spot
    node, and the run with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote(*arguments)


def spilled_so_far() -> int:
    """What the object stores of all nodes have written to disk since the cluster started, for want of
    memory. 0 where nobody answers: a figure that cannot be had stops no run."""
    try:
        return ray_compat.spilled_bytes()
    except Exception:
        logger.debug("the object stores could not be asked", exc_info=True)
        return 0


class StageMetrics:
    """A stage's Prometheus metrics."""

    def __init__(self, stage: str) -> None:
        from ray.util import metrics

        self.stage = stage
        made = {name: metric.make(metrics) for name, metric in STAGES.items()}
        self._rows, self._seconds, self._warm_up = made["rows"], made["seconds"], made["warm_up"]
        self._tokens, self._cost, self._score = made["tokens"], made["cost"], made["score"]

    def warmed(self, seconds: float) -> None:
        self._warm_up.inc(seconds, {"stage": self.stage})

    def count(self, rows: Sequence[Row]) -> None:
        errors = sum(row["error"] is not None for row in rows)
        for outcome, count in (("ok", len(rows) - errors), ("error", errors)):
            if count:
                self._rows.inc(count, {"stage": self.stage, "outcome": outcome})
        seconds = sum((row["seconds"] or {}).get(self.stage) or 0.0 for row in rows)
        if seconds > 0:
            self._seconds.inc(seconds, {"stage": self.stage})
        if self.stage == "score":
            scores = [row["score"] for row in rows if row["score"] is not None]
            if scores:
                self._score.set(scores[-1])
        used = [usage for row in rows if (usage := (row["usage"] or {}).get(self.stage))]
        for kind in ("prompt", "completion"):
            if tokens := sum(usage[kind] or 0 for usage in used):
                self._tokens.inc(tokens, {"stage": self.stage, "kind": kind})
        if cost := sum(usage["cost"] or 0.0 for usage in used):
            self._cost.inc(cost, {"stage": self.stage})
