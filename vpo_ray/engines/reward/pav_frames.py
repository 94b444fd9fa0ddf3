"""Frames as Prompt-A-Video's scorers take them (its `rewards/`): which of a video, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vpo_ray.engines.reward.image_features import antialiased_pixels


def spread_frames(count: int, number: int) -> list[int]:
    """Indices of `number` frames of a video of `count`: int(arange(0, count, count / number)). The last is
    not the video's last; where there are fewer frames, some occur twice."""
    return [int(i) for i in np.arange(0, count, count / number).astype(int)[:number]]


def four_frames(timestamps: Sequence[float], fps: float) -> list[int]:
    """Those that the aesthetic predictor and MPS see."""
    return spread_frames(len(timestamps), 4)


# Shorter side to CLIP's size by Pillow's bicubic, centre crop, CLIP's normalisation.
pav_pixels = antialiased_pixels
