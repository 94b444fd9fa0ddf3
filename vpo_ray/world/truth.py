"""How well a clip gives what a query asks for: the figure that the reward model only estimates.

A recipe's evaluation measures it with `kind: vpo_ray.world.truth:Truth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.recipe import Reward
from vpo_ray.world import lexicon

if TYPE_CHECKING:
    from vpo_ray.world.detector import Detected


def marks(named: Mapping[str, str | None], seen: Detected) -> dict[str, float]:
    """1 right, 0 wrong, 0.5 where the clip is between two values, for each attribute that is named, for
    `whole` (one whole thing throughout) and for `look` (clear)."""
    given = {
        name: 0.5 if (value := getattr(seen, name)) is None else float(value == asked)
        for name, asked in named.items()
        if asked is not None
    }
    return given | {"whole": float(seen.whole), "look": float(seen.look == "clear")}


def truth(named: Mapping[str, str | None], clip: np.ndarray) -> float:
    """The mean of `marks` of a clip, uint8 RGB (frames, height, width, 3): from 0 to 1."""
    # Imported here, as a builder's module should: every command that reads a recipe imports this one.
    from vpo_ray.world.detector import detect

    return float(np.mean(list(marks(named, detect(clip)).values())))


class Truth:
    """A reward's form of it, for evaluations: the dimensions are the marks, the score is their mean."""

    class Options(BaseModel):
        pass

    def __init__(self, settings: Reward, options: Options) -> None:
        pass

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`. What a query names is what the lexicon reads in it."""
        return [self._score(*pair) for pair in zip(videos, queries, strict=True)]

    def _score(self, video: bytes | str, query: str) -> Scored | Exception:
        from vpo_ray.engines.reward.frames import read_video
        from vpo_ray.world.detector import detect

        try:
            clip, _ = read_video(video)
        except RewardError as error:
            return error
        found = marks(lexicon.read(query), detect(clip))
        return Scored([], found, float(np.mean(list(found.values()))))
