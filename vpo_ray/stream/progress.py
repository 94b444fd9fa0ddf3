"""What a run shows while it works: counts per stage, as a status table and as Ray metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vpo_ray import terminal
from vpo_ray.records import Row, Shard
from vpo_ray.stream import ray_compat
from vpo_ray.stream.spending import Book, Charges

logger = logging.getLogger(__name__)

COUNTS = ("started", "done", "errors", "passed", "warm_up_s")


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
        self._counts: dict[str, dict[str, float]] = {stage: dict.fromkeys(COUNTS, 0) for stage in stages}

    def add(self, stage: str, **counts: float) -> None:
        for name, count in counts.items():
            self._counts[stage][name] += count

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

    def snapshot(self) -> dict[str, dict[str, float]]:
        return self._counts


def spilled_so_far() -> int:
    """What the object stores of all nodes have written to disk since the cluster started, for want of
    memory. 0 where nobody answers: a figure that cannot be had stops no run."""
    try:
        return ray_compat.spilled_bytes()
    except Exception:
        logger.debug("the object stores could not be asked", exc_info=True)
        return 0


class StageMetrics:
    """A stage's Prometheus metrics, exported by Ray on every node."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self.stage = stage
        self._rows = Counter("vpo_rows", "Rows that left a stage", tag_keys=("stage", "outcome"))
        self._seconds = Counter(
            "vpo_replica_seconds", "Busy seconds of a stage's replicas", tag_keys=("stage",)
        )
        self._warm_up = Counter(
            "vpo_warm_up_seconds", "Seconds in which replicas loaded and compiled", tag_keys=("stage",)
        )
        self._tokens = Counter("vpo_tokens", "Tokens of the LLMs", tag_keys=("stage", "kind"))
        self._cost = Counter("vpo_cost", "Paid to endpoints, in their prices' currency", tag_keys=("stage",))
        self._score = Gauge("vpo_score", "The last score of a replica")

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


class StatusTable:
    """Prints the counts to stderr: redrawn in place on a terminal, every `every_s` otherwise.

    Use as a context manager around the work.

    Args:
        shard: which it names, where the work is one.
    """

    def __init__(self, progress: Any, every_s: float = 15.0, shard: Shard | None = None) -> None:
        self._progress, self._every, self._shard = progress, every_s, shard
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> StatusTable:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        import ray
        from rich.console import Console

        stream = terminal.ours()
        console = Console(file=stream, width=None if stream.isatty() else 100)
        shown = ""
        while True:
            last = self._stop.wait(self._every)
            try:
                counts = ray.get(self._progress.snapshot.remote(), timeout=5)
            except Exception:
                # A status that cannot be had must never stop the run.
                logger.debug("no status this time", exc_info=True)
                counts = {}
            text = status_lines(counts, time.monotonic() - self._began, self._shard)
            if counts and text.split("\n", 1)[1] != shown:
                shown = text.split("\n", 1)[1]
                console.print(text, highlight=False, markup=False)
            if last:
                return


def status_lines(
    counts: Mapping[str, Mapping[str, float]], elapsed_s: float, shard: Shard | None = None
) -> str:
    """The status as text: one line a stage with done, in flight, rate and errors."""
    lines = [f"{elapsed_s:7.0f} s   {'done':>8} {'in flight':>10} {'rows/s':>8} {'errors':>7}"]
    lines[0] += f"   shard {shard}" if shard else ""
    for stage, n in counts.items():
        flight = max(0, n["started"] - n["done"])
        rate = n["done"] / max(elapsed_s, 1e-9)
        lines.append(f"  {stage:<9} {n['done']:>8} {flight:>10} {rate:>8.2f} {n['errors']:>7}")
    return "\n".join(lines)
