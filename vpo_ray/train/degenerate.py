"""A guard against degenerate DPO: margins that grow although the policy gets worse.

Pure functions over the training curve. The loss cannot show either case: it sees only the
difference between chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpo_ray.recipe import Dpo
from vpo_ray.records import Row

WINDOW = 10


def degenerate(curve: Sequence[Row], settings: Dpo) -> dict[str, str]:
    """Warnings about the end of the curve, by kind, with their numbers; empty while all is well.

    Batches differ, so means over WINDOW steps are compared: the chosen responses' log-probability with
    the reference's, and the end-of-turn token's with that of the first WINDOW steps. The second is a
    proxy for length: a policy that no longer stops where chosen responses end keeps writing.
    """
    if len(curve) < WINDOW:
        return {}
    last = curve[-WINDOW:]
    guard, found = settings.guard, {}
    per_token = settings.length_normalise or settings.loss == "ipo"
    drop = -_mean(
        [line["chosen_reward"] / settings.beta / (1 if per_token else line["chosen_tokens"]) for line in last]
    )
    if guard.chosen_drop and drop > guard.chosen_drop:
        found["chosen_drop"] = (
            f"the chosen responses' log-probability fell {drop:.2f} nats a token below the reference's "
            f"(limit {guard.chosen_drop:g}) while the margin is {_mean([x['margin'] for x in last]):.3g}: "
            "the policy gives up the chosen responses too. Lower lr, raise beta or set rpo_alpha"
        )
    ends = [_mean([line["end_logp"] for line in part]) for part in (curve[:WINDOW], last)]
    if guard.end_drop and ends[0] - ends[1] > guard.end_drop:
        lengths = [_mean([line[f"{side}_tokens"] for line in curve]) for side in ("chosen", "rejected")]
        found["end_drop"] = (
            f"the log-probability of ending where chosen responses end fell from {ends[0]:.2f} to "
            f"{ends[1]:.2f} (limit {guard.end_drop:g}): responses get longer. Chosen responses have "
            f"{lengths[0]:.0f} tokens, rejected ones {lengths[1]:.0f}; set length_normalise, or lower lr"
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
