"""Measures of a video by VBench's published definitions (arXiv 2311.17982 and its repository).

Those that need no other code than transformers and OpenCV: see `Dimension` in the recipe. All frames of a
video count. What differs from VBench's own command is said where it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.engines.reward.motion import Motion, temporal_flickering
from vpo_ray.recipe import Reward

# They compare frames.
_OF_TWO_FRAMES = {
    "temporal_flickering", "dynamic_degree", "motion_magnitude", "background_consistency",
    "subject_consistency",
}  # fmt: skip


@dataclass
class Clip:
    """A decoded video, uint8 RGB (T, H, W, 3), and its query."""

    frames: np.ndarray
    fps: float
    query: str

    @cached_property
    def motion(self) -> Motion:
        return Motion(self.frames, self.fps)


class VBench:
    """Measures the recipe's `dimensions` of each video; its score is their mean. Built by `build`."""

    def __init__(self, settings: Reward) -> None:
        self.settings = settings
        self.measures = {
            "temporal_flickering": lambda clip: temporal_flickering(clip.frames),
            "dynamic_degree": lambda clip: clip.motion.dynamic,
            "motion_magnitude": lambda clip: clip.motion.magnitude,
        }

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`. A video of one frame is an error where a dimension compares frames."""
        return [self._scored(*pair) for pair in zip(videos, queries, strict=True)]

    def _scored(self, video: bytes | str, query: str) -> Scored | Exception:
        try:
            frames, fps = read_video(video)
            found = self._measured(Clip(frames, fps, query))
        except RewardError as error:
            return error
        return Scored([], found, float(np.mean(list(found.values()))))

    def _measured(self, clip: Clip) -> dict[str, float]:
        compared = [name for name in self.settings.dimensions if name in _OF_TWO_FRAMES]
        if len(clip.frames) < 2 and compared:
            raise RewardError(f"the video has one frame, and {' and '.join(compared)} compare frames")
        return {name: self.measures[name](clip) for name in self.settings.dimensions}


def build(settings: Reward) -> VBench:
    """The measures of a recipe."""
    return VBench(settings)
