"""VideoReward (KwaiVGI/VideoAlign, arXiv 2501.13918): marks for look, motion and agreement with the query.

A Qwen2-VL reads the video and a template with three marker tokens; a linear head on their hidden states gives
three numbers, which are normalised by the mean and deviation that upstream measured. `vpo convert-reward`
makes the folder that `model` names. Numbers here are of upstream's `model_config.json`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.recipe import Reward
from vpo_ray.recipe.base import Positive, Source

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

SLOT = "{text_prompt}"
MARKERS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
# sha256 of DETAILED_PROMPT_WITH_SPECIAL_TOKEN in upstream's prompt_template.py, its first 16 digits.
TEMPLATE_HASH = "fdb6309bac618dd0"
Moments = tuple[float, Annotated[float, Field(gt=0)]]


class Normalisation(BaseModel):
    """Mean and standard deviation of each raw number over upstream's data."""

    VQ: Moments = (3.6757, 2.2476)
    MQ: Moments = (1.1646, 1.3811)
    TA: Moments = (2.8105, 2.5121)


class VideoRewardOptions(BaseModel):
    template: Source = Field(description="upstream's prompt, with {text_prompt} and the three markers")
    fps: Annotated[float, Field(gt=0)] = Field(2, description="frames a second that the model sees")
    max_pixels: Positive = Field(200_704, description="of a frame, after it is resized")
    normalisation: Normalisation = Normalisation()


class TemplateError(ValueError):
    """A template that cannot be read or lacks what the model reads its marks at."""

    stops_run = True  # see stream/stops.py


class VideoReward:
    """The builder. Dimensions are the normalised VQ, MQ and TA, and each as the model said it (`VQ_raw`); the
    score is the sum of the first three, upstream's `Overall`.

    Raises:
        TemplateError: the template is not what it should be.
        CheckpointError: `model` is no folder that `vpo convert-reward videoreward` makes.
    """

    Options = VideoRewardOptions
    version = "1"
    checkpoints = ("model",)
    dimensions = ("VQ", "MQ", "TA", "VQ_raw", "MQ_raw", "TA_raw")

    def __init__(self, settings: Reward, options: VideoRewardOptions) -> None:
        self.options = options
        template = read_template(options.template)
        # torch takes seconds, and every command that reads the recipe imports this module.
        from vpo_ray.engines.reward.qwen2_vl import MarkedQwen

        self.model = MarkedQwen(settings, template, SLOT, MARKERS)

    @staticmethod
    def problems(settings: Reward, options: VideoRewardOptions) -> Iterator[str]:
        yield from unused_keys(settings, "videoreward", "model dtype device attention")

    @staticmethod
    def identity(settings: Reward, options: VideoRewardOptions) -> str:
        """The weights, and the rules that upstream's own code has for frames and positions."""
        return f"{settings.model}, positions sequential, frames uniform at {options.fps:g}/s and even"

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`. Videos go through the model one by one, so that no padding or other video
        changes a number."""
        return [self._scored(*pair) for pair in zip(videos, queries, strict=True)]

    def _scored(self, video: bytes | str, query: str) -> Scored | Exception:
        try:
            raw = self.model.marks(self.frames(video), query, self.options.max_pixels)
        except RewardError as error:
            return error
        return self.read(raw)

    def frames(self, video: bytes | str) -> np.ndarray:
        """The frames that the model sees: uint8 (T, H, W, 3). Raises RewardError."""
        from vpo_ray.engines.reward.frames import read_frames

        return read_frames(video, self.pick)

    def pick(self, timestamps: Sequence[float], fps: float) -> list[int]:
        """Which frames those are; see `RewardModel`."""
        from vpo_ray.engines.reward.qwen2_vl import uniform_frames

        return uniform_frames(len(timestamps), fps, self.options.fps)

    def read(self, raw: Sequence[float]) -> Scored:
        """The result of one video from the three numbers at the markers."""
        by_name = dict(zip(("VQ", "MQ", "TA"), raw, strict=True))
        moments = self.options.normalisation.model_dump()
        scaled = {name: (value - moments[name][0]) / moments[name][1] for name, value in by_name.items()}
        kept = {f"{name}_raw": value for name, value in by_name.items()}
        return Scored([], scaled | kept, sum(scaled.values()))


def read_template(path: str) -> str:
    """The prompt at a path or URI. One of other words than the weights were trained with is a warning.

    Raises:
        TemplateError: it cannot be read, or has not the slot and each marker once.
    """
    try:
        text = read_text(path)
    except TextFileError as error:
        raise TemplateError(f"options.template: {error}") from error
    if wrong := [part for part in (SLOT, *MARKERS) if text.count(part) != 1]:
        raise TemplateError(f"options.template: {path} must have {' and '.join(wrong)} once")
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    if found != TEMPLATE_HASH:
        log.warning(
            "the template %s has the hash %s, and VideoReward was trained with %s: its marks may mean less",
            path,
            found,
            TEMPLATE_HASH,
        )
    return text
