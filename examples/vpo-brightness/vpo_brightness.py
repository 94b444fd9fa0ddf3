"""A reward for vpo_ray: a video whose mean brightness is near `target`, and that moves, is a good one."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.frames import read_frames
from vpo_ray.recipe import Reward


class Brightness:
    class Options(BaseModel):
        target: float = Field(0.5, ge=0, le=1, description="0 is black, 1 is white")
        motion_weight: float = Field(1.0, ge=0)

    def __init__(self, settings: Reward, options: Options) -> None:
        self.options = options

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        return [self._score(video) for video in videos]

    def _score(self, video: bytes | str) -> Scored | Exception:
        try:
            frames = read_frames(video, lambda times, fps: list(range(len(times)))) / 255.0
        except RewardError as error:
            return error
        brightness = 1 - abs(float(frames.mean()) - self.options.target)
        motion = float(np.abs(np.diff(frames, axis=0)).mean()) if len(frames) > 1 else 0.0
        score = brightness + self.options.motion_weight * motion
        return Scored([], {"brightness": brightness, "motion": motion}, score)
