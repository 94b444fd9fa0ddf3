"""Group: all candidates of a query become one row of group-relative learning. Pure functions.

The reward of a candidate is its video's score, by a reward or by the recipe's formula. One that the judge
refuses has no video; its reward is a floor, so that safety and intent are learnt from text alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vpo_ray.recipe import Rl
from vpo_ray.records import Row, group_id
from vpo_ray.stages.pair import is_scored

REFUSED = ("unsafe", "imprecise", "refusal")
# Keeps the advantages of a group whose rewards hardly differ finite; TRL has the same number.
EPSILON = 1e-4


def group_of_query(
    candidates: Sequence[Row],
    settings: Rl,
    lowest: float,
    reasons: Counter[str],
    queries: Counter[str],
) -> Row | None:
    """The group of one query's candidates; None where nothing can be learnt from them.

    Args:
        candidates: Feedback rows of one query, in any order, with the score of what decides: `pair.by_rule`.
        lowest: the lowest score of the run's candidates, the reward of a refused one without a floor.
        reasons: counts candidates that are left out.
        queries: counts queries that have no group.
    """
    known = []
    for row in sorted(candidates, key=lambda row: row["k"]):
        value, fault = _reward(row, settings, lowest)
        if value is None:
            reasons[fault] += 1
        else:
            known.append((row, value))
    if len(known) < 2:
        queries["fewer than two candidates with a reward"] += 1
        return None
    rewards = [value for _, value in known]
    if max(rewards) == min(rewards):
        queries["all rewards are equal"] += 1
        return None
    values = advantages(rewards, settings.scale)
    ids = [row["candidate_id"] for row, _ in known]
    first = known[0][0]
    return {
        "group_id": group_id(ids, values),
        "query_id": first["query_id"],
        "query": first["query"],
        "image": first.get("image"),
        "candidate_ids": ids,
        "prompts": [row["prompt"] for row, _ in known],
        "rewards": rewards,
        "advantages": values,
        "profile": first.get("profile"),
        "conditions": first.get("conditions"),
    }


def advantages(rewards: Sequence[float], scale: str) -> list[float]:
    """Rewards less their mean; with `scale` group over their standard deviation (n - 1), as TRL has it."""
    values = np.asarray(rewards, dtype=np.float64)
    centred = values - values.mean()
    if scale == "group":
        centred /= values.std(ddof=1) + EPSILON
    return [float(value) for value in centred]


def _reward(row: Row, settings: Rl, lowest: float) -> tuple[float | None, str]:
    """A candidate's reward, or why it has none."""
    if not (row["prompt"] or "").strip():
        return None, "no prompt"
    if row["error"] is not None:
        return None, f"failed in {row['error_stage']}"
    if row["verdict"] in REFUSED:
        floor: float | None = getattr(settings.floors, row["verdict"])
        return lowest if floor is None else floor, ""
    return (row["score"], "") if is_scored(row) else (None, "no score")
