"""Measures of a video by VBench's published definitions (arXiv 2311.17982 and its repository).

Those that need no other code than transformers and OpenCV: see `Dimension` in the recipe. All frames of a
video count. What differs from VBench's own command is said where it is computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.aesthetic_head import read_aesthetic_head
from vpo_ray.engines.reward.checkpoint import CheckpointError
from vpo_ray.engines.reward.frames import every_frame, read_video
from vpo_ray.engines.reward.image_features import Clip, Dino, antialiased_pixels
from vpo_ray.engines.reward.motion import Motion, temporal_flickering
from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.recipe import Reward

# They compare frames.
_OF_TWO_FRAMES = {
    "temporal_flickering", "dynamic_degree", "motion_magnitude", "background_consistency",
    "subject_consistency",
}  # fmt: skip


@dataclass
class DecodedVideo:
    """A decoded video, uint8 RGB (T, H, W, 3), and its query."""

    frames: np.ndarray
    fps: float
    query: str

    @cached_property
    def motion(self) -> Motion:
        return Motion(self.frames, self.fps)


Measure = Callable[[DecodedVideo], float | None]


class VBench:
    """Measures the recipe's `dimensions` of each video; its score is their mean. Built by `build`."""

    def __init__(self, settings: Reward) -> None:
        self.measures = _measures(settings)
        self.pick = every_frame

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`. A video of one frame is an error where a dimension compares frames."""
        return [self._scored(*pair) for pair in zip(videos, queries, strict=True)]

    def _scored(self, video: bytes | str, query: str) -> Scored | Exception:
        try:
            found = self._measured(DecodedVideo(*read_video(video), query))
        except RewardError as error:
            return error
        except torch.OutOfMemoryError as error:
            return RewardError(f"out of memory with this video alone: {error}")
        return Scored([], found, float(np.mean(list(found.values()))))

    def _measured(self, video: DecodedVideo) -> dict[str, float]:
        compared = [name for name in self.measures if name in _OF_TWO_FRAMES]
        if len(video.frames) < 2 and compared:
            raise RewardError(f"the video has one frame, and {' and '.join(compared)} compare frames")
        found = {name: measure(video) for name, measure in self.measures.items()}
        known = {name: value for name, value in found.items() if value is not None}
        if not known:
            raise RewardError("VBench has no style of this query, which is none of its own prompts")
        return known


def build(settings: Reward) -> VBench:
    """The measures of a recipe, with their models loaded.

    Raises:
        CheckpointError: a model, the aesthetic head or the file of styles is not what it should be.
    """
    return VBench(settings)


def _measures(settings: Reward) -> dict[str, Measure]:
    """By dimension, in the order of the recipe. Only models that are asked for are loaded, each once."""
    load = cache(lambda kind, key, name: kind(f"reward.{key}", name, settings.device))
    made: dict[str, Callable[[], Measure]] = {
        "temporal_flickering": lambda: lambda video: temporal_flickering(video.frames),
        "dynamic_degree": lambda: lambda video: video.motion.dynamic,
        "motion_magnitude": lambda: lambda video: video.motion.magnitude,
        "background_consistency": lambda: partial(_consistency, load(Clip, "clip", settings.clip)),
        "subject_consistency": lambda: partial(_consistency, load(Dino, "dino", settings.dino)),
        "aesthetic_quality": lambda: _aesthetic(settings),
        "appearance_style": lambda: _style(load(Clip, "clip", settings.clip), settings.styles),
    }
    return {name: made[name]() for name in settings.dimensions}


def _consistency(model: Clip | Dino, video: DecodedVideo) -> float:
    """The mean, over all frames but the first, of how alike each is to the one before and to the first:
    cosines, not below 0."""
    features = model.images(video.frames)
    later = features[1:]
    cosines = torch.stack([(later * features[:-1]).sum(-1), later @ features[0]])
    return float(cosines.clamp(min=0).mean())


def _aesthetic(settings: Reward) -> Measure:
    """LAION's predictor, trained on marks of 1 to 10, over 10; mean of the frames."""
    assert settings.aesthetic is not None
    model = Clip("reward.aesthetic.clip", settings.aesthetic.clip, settings.device)
    width = model.model.config.projection_dim
    weight, bias = read_aesthetic_head("reward.aesthetic.head", settings.aesthetic.head, width)
    weight, bias = weight.to(model.model.device), bias.to(model.model.device)
    return lambda video: float((model.images(video.frames) @ weight.T + bias).mean()) / 10


def _style(model: Clip, path: str) -> Measure:
    """CLIP's logit of each frame with the style that VBench names for the prompt, over 100; mean of the
    frames. None for a query that is no prompt of this dimension."""
    styles = _styles(path)
    text = cache(model.text)
    scale = float(model.model.logit_scale.detach().exp()) / 100

    def measure(video: DecodedVideo) -> float | None:
        if (style := styles.get(video.query.strip())) is None:
            return None
        return float((model.images(video.frames, antialiased_pixels) @ text(style)[0]).mean()) * scale

    return measure


def _styles(path: str) -> dict[str, str]:
    """The style by prompt, of VBench_full_info.json."""
    try:
        entries: list[dict[str, Any]] = json.loads(read_text(path))
        described = [e for e in entries if "appearance_style" in (e.get("auxiliary_info") or {})]
        found = {e["prompt_en"].strip(): e["auxiliary_info"]["appearance_style"] for e in described}
        return {prompt: style["appearance_style"] for prompt, style in found.items()}
    except TextFileError as error:
        raise CheckpointError(f"reward.styles: cannot read {path}: {error.reason}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"reward.styles: {path} is not VBench_full_info.json: {error!r}") from error
