"""LAION's aesthetic predictors as Prompt-A-Video uses them: the mean of four frames, about 1 to 10.

Prompt-A-Video takes V1 (`rewards/aes_pipe.py`), and pairs above 5.5. All is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.engines.reward.weights_hash import weights_hash
from vpo_ray.recipe import Reward
from vpo_ray.recipe.base import Source


class LaionAestheticOptions(BaseModel):
    clip: Source = Field(description="OpenAI's CLIP ViT-L/14")
    head: Source = Field(description="a safetensors file of the published head's tensors")
    variant: Literal["v1", "v2"] = "v1"


class LaionAesthetic:
    """The builder.

    Raises:
        CheckpointError: the CLIP or the head cannot be loaded, or is not what the predictor was trained on.
    """

    Options = LaionAestheticOptions
    version = "1"
    checkpoints = ("clip",)
    dimensions = ("aesthetic",)

    def __init__(self, settings: Reward, options: LaionAestheticOptions) -> None:
        # It imports torch, and every command that reads the recipe imports this module.
        from vpo_ray.engines.reward.aesthetic_head import AestheticScorer

        self._scorer = AestheticScorer(options.clip, options.head, options.variant, settings.device)
        self.pick = self._scorer.pick

    @staticmethod
    def problems(settings: Reward, options: LaionAestheticOptions) -> Iterator[str]:
        yield from unused_keys(settings, "laion_aesthetic", "device")

    @staticmethod
    def identity(settings: Reward, options: LaionAestheticOptions) -> str:
        """The weights, the variant, the dtype and which frames."""
        head, clip = weights_hash(options.head), weights_hash(options.clip)
        return f"{options.variant}, head {head}, clip {clip}, float32, 4 spread frames"

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`; the queries are not looked at."""
        return self._scorer.score(videos, queries)
