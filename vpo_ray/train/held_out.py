"""Held-out rows: which they are, when they are evaluated, which evaluation was the best.

Everything follows from content and from the curve, so that a restarted worker makes the same decisions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from vpo_ray.recipe import Evaluate, Training
from vpo_ray.records import Row, share_of
from vpo_ray.train.examples import Example


def hold_out(
    examples: Sequence[Example], groups: dict[str, str], share: float
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and held-out ones.

    The share is of queries, chosen by their content. All rows of a query are on one side, or the policy
    would be evaluated on a query that it has seen. Where a share above 0 selects no query, the one nearest
    to it is held out.

    Args:
        examples: of a phase, in any order.
        groups: example id to query id.
        share: of the queries, from 0 to 1.
    """
    if share == 0:
        return list(examples), []
    points = {query: share_of("held out", query) for query in {groups[e.id] for e in examples}}
    bound = max(share, min(points.values()) + 1e-12)
    held_out = [e for e in examples if points[groups[e.id]] < bound]
    return [e for e in examples if points[groups[e.id]] >= bound], held_out


def evaluation_due(done: int, steps: int, rows: int, settings: Training) -> bool:
    """Whether step `done` of `steps` is followed by an evaluation: every `evaluate.steps` (or epoch)
    and at the end."""
    every = settings.evaluate.steps or math.ceil(rows / settings.global_batch)
    return done % every == 0 or done == steps


def best(curve: Sequence[Row], settings: Evaluate) -> Row | None:
    """The line of the best evaluation (the first of equals), None before there is one. Evaluations without
    a finite number do not count."""
    evaluated = [line for line in curve if math.isfinite(_value(line, settings))]
    return max(evaluated, key=lambda line: _value(line, settings)) if evaluated else None


def enough(curve: Sequence[Row], settings: Evaluate) -> bool:
    """Early stopping: `patience` evaluations since the best one."""
    if settings.patience is None:
        return False
    top = best(curve, settings)
    since = [line for line in curve if f"eval_{settings.metric}" in line]
    return len([line for line in since if top is None or line["step"] > top["step"]]) >= settings.patience


def score(line: Row, curve: Sequence[Row], settings: Evaluate) -> float:
    """A finite number for a line of the curve that orders checkpoints as `best` does.

    Of two equal scores Ray Train keeps the later one, and would delete the one that `best` chooses. So each
    line loses one unit in the last place for every earlier line with the same metric.
    """
    value = _value(line, settings)
    if not math.isfinite(value):
        return -sys.float_info.max
    equal = sum(_value(x, settings) == value for x in curve if x["step"] < line["step"])
    return value - equal * math.ulp(value)


def _value(line: Row, settings: Evaluate) -> float:
    """The metric of a line, higher is better; NaN where there is none."""
    value = line.get(f"eval_{settings.metric}")
    return math.nan if value is None else float(-value if settings.metric == "loss" else value)
