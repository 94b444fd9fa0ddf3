"""Grouping as a step of a run: `feedback/` into `groups/`, and why other queries have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages.group import group_of_query
from vpo_ray.stages.pair import by_rule, is_scored
from vpo_ray.storage.run_dir import GROUPED, RunDir

_COLUMNS = (
    "candidate_id", "query_id", "query", "image", "k", "prompt", "verdict", "answers", "dimensions", "score",
    "more_rewards", "error", "error_stage", "profile", "conditions",
)  # fmt: skip


def make_groups(recipe: Recipe, run: RunDir) -> int:
    """Fill `groups/` from `feedback/`, replacing what is there.

    Raises:
        LoopError: there is no group, and nothing was replaced; the message counts the reasons.
    """
    candidates, queries = Counter[str](), Counter[str]()
    found = _groups(recipe, run, candidates, queries)
    first = next(found, None)
    count = 0 if first is None else run.table("groups").replace(chain([first], found))
    run.write_json(GROUPED, {"queries": dict(queries), "candidates": dict(candidates)})
    if not count:
        counts = (
            f"{n:6} {what}: {why}"
            for what, of in (("queries", queries), ("candidates", candidates))
            for why, n in of.most_common()
        )
        listed = "\n  ".join(counts)
        raise LoopError(
            "no query has candidates whose rewards differ, so there is nothing to learn:\n  "
            f"{listed or '  there is no feedback'}\n"
            "Sample more (sample.k), raise sample.temperature, or look at feedback/ for errors"
        )
    return count


def _groups(recipe: Recipe, run: RunDir, left_out: Counter[str], without: Counter[str]) -> Iterator[Row]:
    assert recipe.rl is not None
    ignored: Counter[str] = Counter()
    scored = (row for rows in _candidates(recipe, run, ignored) for row in rows if is_scored(row))
    lowest = min((row["score"] for row in scored), default=0.0)
    for rows in _candidates(recipe, run, left_out):
        group = group_of_query(rows, recipe.rl, lowest, left_out, without)
        if group is not None:
            yield group


def _candidates(recipe: Recipe, run: RunDir, left_out: Counter[str]) -> Iterator[list[Row]]:
    """The candidates of each query, with the score of what decides."""
    formula = recipe.formula and recipe.formula.at(run.round_number())
    for candidates in run.table("feedback").groups("query_id", _COLUMNS):
        rows, why = by_rule(candidates, recipe.pair, formula)
        left_out.update(why)
        yield rows
