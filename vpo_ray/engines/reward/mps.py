"""MPS (Kwai-Kolors/MPS, arXiv 2405.14705), a model of people's preference among images, on four frames.

The score is the frames' mean, about 5 to 15; Prompt-A-Video (`rewards/MPS`) pairs above 8.5. `model` is a
folder with config.json and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and safetensors of the
checkpoint's own tensors: `model.*` (the CLIP) and `cross_model.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, Field

from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.engines.reward.weights_hash import weights_hash
from vpo_ray.recipe import Reward
from vpo_ray.records import content_id

# What the released "overall" weights were trained with. The full stop belongs to it.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)


class MpsOptions(BaseModel):
    condition: str = CONDITION
    threshold: float = Field(
        0.3, lt=1, description="words of the query less like the condition are not looked at"
    )


class Mps:
    """The builder.

    Raises:
        CheckpointError: `model` cannot be loaded, or is no MPS.
    """

    Options = MpsOptions
    version = "1"
    checkpoints = ("model",)
    dimensions = ("mps",)

    def __init__(self, settings: Reward, options: MpsOptions) -> None:
        # It imports torch, and every command that reads the recipe imports this module.
        from vpo_ray.engines.reward.mps_model import MpsScorer

        self._scorer = MpsScorer(settings, options.condition, options.threshold)
        self.pick = self._scorer.pick

    @staticmethod
    def problems(settings: Reward, options: MpsOptions) -> Iterator[str]:
        yield from unused_keys(settings, "mps", "model dtype device")

    @staticmethod
    def identity(settings: Reward, options: MpsOptions) -> str:
        """The weights, the dtype, which frames, and the condition."""
        condition = content_id(options.condition, digits=16)
        return (
            f"weights {weights_hash(settings.model)}, {settings.dtype}, 4 spread frames, "
            f"condition {condition} above {options.threshold:g}"
        )

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`."""
        return self._scorer.score(videos, queries)
