"""How good the small world's reward is, on rendered clips that it was not trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardModel, Scored, build
from vpo_ray.world.language import query
from vpo_ray.world.questions import BLIND_SPOT, CHECKS
from vpo_ray.world.reward_clips import FRAME_STRATEGY, ClipGroup, Clips, read_groups


def settings(folder: Path) -> recipe.Reward:
    """The world's reward as the recipes run it."""
    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "frame_strategy": FRAME_STRATEGY,
        "rule": "margin",
        "checklist": recipe.Checklist(file=str(folder / "checklist.yaml")),
        "device": "cpu",
    }
    return recipe.Reward(**given)


def answer_figures(folder: Path, groups: Sequence[ClipGroup], seed: int = 1) -> dict[str, Any]:
    """The reward of a folder, through the product's engine: its answers about the clips for their own queries
    and, for as many, for queries with attributes changed; and its scores for own queries.

    Returns:
        `clips` and `queries`, their numbers; `questions`, a row for each: `right`, the share of answers,
        and `constant`, that of always the same answer; `right` of all answers; `pairs`, of how many pairs of
        clips of one query the truth differs; `preferred`, in what share the truly better one has the
        higher score, and `tied`, in what share both have the same; `blind_spot`.
    """
    return compare(build(settings(folder)), groups, read_groups(groups), np.random.default_rng(seed))


def compare(
    reward: RewardModel, groups: Sequence[ClipGroup], clips: Clips, rng: np.random.Generator
) -> dict[str, Any]:
    """`figures` of a reward that is loaded, with the groups' clips as `read_groups` reads them."""
    videos = [video for group in groups for video in group.videos]
    own = [group.asked for group in groups for _ in group.videos]
    changed = [query(clips.scene(i, 0.4, rng), rng) for i in range(len(clips))]
    given, right, scores = [], [], []
    for queries in (own, changed):
        for i in range(0, len(videos), 8):
            results = reward.score(videos[i : i + 8], [asked.text for asked in queries[i : i + 8]])
            for scored in results:
                if not isinstance(scored, Scored):
                    raise scored
                scores.append(scored.score)
                given.append([answer.yes for answer in scored.answers])
        right += [clips.answers(i, asked.named) for i, asked in enumerate(queries)]
    questions, same, known = _table(np.array(given), np.array(right))
    preferred, tied, pairs = _pairs(groups, clips, scores[: len(videos)])
    return {
        "clips": len(clips),
        "queries": len(groups),
        "questions": questions,
        "right": round(float(same[known].mean()), 3),
        "pairs": pairs,
        "preferred": preferred,
        "tied": tied,
        "blind_spot": " ".join(BLIND_SPOT),
    }


def _table(given: np.ndarray, right: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    same, known, table = given == (right == 1), right >= 0, {}
    for i, check in enumerate(CHECKS):
        yes = float((right[known[:, i], i] == 1).mean())
        share = float(same[known[:, i], i].mean())
        table[check.key] = {"right": round(share, 3), "constant": round(max(yes, 1 - yes), 3)}
    return table, same, known


def _pairs(groups: Sequence[ClipGroup], clips: Clips, scores: Sequence[float]) -> tuple[float, float, int]:
    """Shares of pairs with the higher score for the truly better clip and with equal scores; their number."""
    gaps, start = [], 0
    for group in groups:
        numbers = range(start, start := start + len(group.videos))
        truths = [clips.truth(i, group.asked.named) for i in numbers]
        own = list(zip(truths, (scores[i] for i in numbers), strict=True))
        for (true_a, a), (true_b, b) in itertools.combinations(own, 2):
            if abs(true_a - true_b) > 1e-6:
                gaps.append((a - b) * np.sign(true_a - true_b))
    gap = np.array(gaps)
    tied = np.abs(gap) < 1e-6
    return round(float((gap[~tied] > 0).sum() / len(gap)), 3), round(float(tied.mean()), 3), len(gap)
