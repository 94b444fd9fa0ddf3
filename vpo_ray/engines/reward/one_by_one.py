"""Videos that are scored one after another, so that one that cannot be scored is an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vpo_ray.engines.reward import RewardError, Scored


def score_one_by_one(
    videos: Sequence[bytes | str],
    queries: Sequence[str],
    score: Callable[[bytes | str, str], Scored],
) -> list[Scored | Exception]:
    """See `RewardModel.score`. `score` raises RewardError for a video that it cannot score."""
    results: list[Scored | Exception] = []
    for video, query in zip(videos, queries, strict=True):
        try:
            results.append(score(video, query))
        except RewardError as error:
            results.append(error)
        except torch.OutOfMemoryError as error:
            results.append(RewardError(f"out of memory with this video alone: {error}"))
    return results
