"""What the counts of a stream, or the steps of a training, say to somebody who waits: done of how many, how
fast, how busy the pools are, how long it takes still.

A view is a plain dict, as `meta/state.json` keeps it. That of a stream has `stages`; that of a training has
`step` and `steps`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vpo_ray.records import Row

# Seconds over which rates are means: a video may take minutes.
WINDOW_S = 180.0


class Meter:
    """Makes views of a stream's counts (see `progress.Progress`).

    Args:
        what: is done, as the user calls it.
        before: rows that each stage, or a later one, had finished when the stream began.
        total: rows that each stage sees in the end; None where nobody knows.
    """

    def __init__(self, what: str, before: Mapping[str, int], total: int | None) -> None:
        self.what, self.before, self.total = what, before, total
        self._seen: deque[tuple[float, Mapping[str, Mapping[str, Any]]]] = deque()
        self._began: float | None = None

    def view(self, now: float, counts: Mapping[str, Mapping[str, Any]], spent: float = 0.0) -> Row:
        """The view at a moment, in seconds of any clock."""
        self._began = now if self._began is None else self._began
        self._seen.append((now, counts))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        stages = [self._stage(name, found) for name, found in counts.items()]
        waiting = [stage for stage in stages if stage["left_s"] is not None]
        last = max(waiting, key=lambda stage: stage["left_s"], default=None)
        # Alone, with rows at hand, a stage that is busy for a half of the time would take half as long.
        slowest = max(waiting, key=lambda stage: stage["left_s"] * (stage["busy"] or 1.0), default=None)
        unknown = any(stage["left_s"] is None for stage in stages)
        return {
            "what": self.what,
            "elapsed_s": round(now - self._began, 1),
            "stages": stages,
            "slowest": slowest["name"] if slowest and slowest["left_s"] > 0 and len(stages) > 1 else None,
            "left_s": None if unknown or last is None else last["left_s"],
            "spent": spent,
        }

    def _begin(self, name: str) -> tuple[float, Mapping[str, Any]]:
        """When the window of a stage begins, and its counts then: not before rows have reached it."""
        reached = (n for n, (_, counts) in enumerate(self._seen) if _at_work(counts.get(name, {})))
        when, counts = self._seen[max(0, next(reached, 0) - 1)]
        return when, counts.get(name, {})

    def _stage(self, name: str, found: Mapping[str, Any]) -> Row:
        then, past = self._begin(name)
        gone = self._seen[-1][0] - then

        def grown(*columns: str) -> float:
            return sum(found.get(column, 0) - past.get(column, 0) for column in columns)

        behind = self.before.get(name, 0) + found["done"] + found["passed"]
        rate = grown("done", "passed") / gone if gone > 0 else 0.0
        left: float | None = None
        if self.total is not None:
            rest = max(0, self.total - behind)
            left = 0.0 if rest == 0 else (rest / rate if rate > 0 else None)
        there = grown("there_s")
        return {
            "name": name,
            "done": int(behind),
            "total": self.total,
            "in_flight": int(found.get("in_flight", 0)),
            "rows_s": grown("done") / gone if gone > 0 else None,
            "busy": min(1.0, grown("busy_s") / there) if there > 0 else None,
            "tokens_s": grown("tokens") / gone if gone > 0 and found.get("tokens") else None,
            "errors": int(found["errors"]),
            "reason": found.get("reason"),
            "left_s": left,
        }


def _at_work(counts: Mapping[str, Any]) -> bool:
    return any(counts.get(column) for column in ("done", "passed", "in_flight"))


class StepMeter:
    """Makes views of a training's steps.

    Args:
        what: the phase.
        steps: how many there are.
    """

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps = what, steps
        self._seen: deque[tuple[float, int, float]] = deque()
        self._began: float | None = None

    def view(self, now: float, told: Mapping[str, Any]) -> Row:
        """The view of what rank 0 told last (see `progress.Steps`)."""
        self._began = now if self._began is None else self._began
        step = int(told.get("step", 0))
        if self._seen and not self._seen[0][1] and step:
            self._seen.clear()  # loading is no step
        if not self._seen or self._seen[-1][1] != step:
            self._seen.append((now, step, told.get("learnt", 0)))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        (then, first, old), (last, _, new) = self._seen[0], self._seen[-1]
        gone = last - then
        each = gone / (step - first) if first and step > first else told.get("seconds")
        rest = self.steps - step
        return {
            "what": self.what,
            "elapsed_s": round(now - self._began, 1),
            "doing": told.get("doing"),
            "step": step,
            "steps": self.steps,
            "loss": told.get("loss"),
            "tokens_s": (new - old) / gone if first and gone > 0 else None,
            "left_s": rest * each if step and each is not None else None,
        }
