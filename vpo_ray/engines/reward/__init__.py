"""Reward models: the score of a video, with the answers and dimensions it is made of.

Every reward has one interface, `RewardModel`, and is built by the name in `reward.kind` of the recipe:
one of `KINDS`, or another's (see `recipe.plugins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

from vpo_ray.engines.endpoint.account import Account
from vpo_ray.recipe import Reward, plugins

# Recipe name -> module; imported on demand, because they import torch.
KINDS = {
    "visionreward": "vpo_ray.engines.reward.visionreward",
    "openai": "vpo_ray.engines.reward.endpoint",
    "vbench": "vpo_ray.engines.reward.vbench",
}


class RewardError(ValueError):
    """One video or query that cannot be scored; the rest of its batch can."""


@dataclass(frozen=True)
class QuestionAnswer:
    """One answer: `question` counts from 1, `probability` is P(yes) among yes and no."""

    question: int
    yes: bool
    probability: float


@dataclass(frozen=True)
class Scored:
    """A scored video. `neither` counts answers whose most likely token is neither yes nor no; a broken
    tokenizer or template gives a high count."""

    answers: list[QuestionAnswer]
    dimensions: dict[str, float]
    score: float
    neither: int = 0


class RewardModel(Protocol):
    """Scores videos for their users' queries.

    One whose attribute `by_uri` is true is given their URIs. One with an attribute `pick`, the rule by which
    it chooses frames, shares a video's decoding with the other rewards of a replica; see `shared_decoding`.
    """

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """One result for every video (its bytes or a URI), in order; an exception for one that cannot
        be scored."""
        ...


@runtime_checkable
class ImageReward(Protocol):
    """Scores videos for queries that may have an image, as a name (`<sha256>.<kind>`) and its bytes."""

    def score_with_images(
        self,
        videos: Sequence[bytes | str],
        queries: Sequence[str],
        images: Sequence[tuple[str, bytes] | None],
    ) -> list[Scored | Exception]:
        """As `RewardModel.score`; called where a query of the batch has an image."""
        ...


@runtime_checkable
class PromptReward(Protocol):
    """Scores prompts for their users' queries, without a video."""

    def score_prompts(self, prompts: Sequence[str], queries: Sequence[str]) -> list[Scored | Exception]:
        """One result for every prompt, in order; an exception for one that cannot be scored."""
        ...


def build(settings: Reward, account: Account | None = None) -> RewardModel:
    """The reward model of a recipe, loaded and ready; it may be a PromptReward. Raises ValueError when it
    cannot be loaded.

    Args:
        account: the answers of an endpoint are charged to it.
    """
    if settings.is_plugin:
        model: RewardModel = plugins.find(settings).build(settings, account)
        return model
    module = import_module(KINDS[settings.kind])
    return module.build(settings, account) if settings.kind == "openai" else module.build(settings)
