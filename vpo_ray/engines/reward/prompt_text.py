"""Rewards on a prompt's text alone, without a video: cheap enough to look before anything is rendered.

`similarity` to the query by a sentence encoder's cosine, `length` in words within bounds, and `required`
words of the query kept. As `gate` of a recipe they decide which prompts are rendered; as one of its rewards
they are columns beside those of the videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.keywords import KeywordFileError, KeywordList
from vpo_ray.prompts.words import word_count
from vpo_ray.recipe.base import Positive, Source
from vpo_ray.recipe.plugins import Modelled


class PromptTextOptions(BaseModel):
    encoder: Source = Field("", description="a sentence encoder, for `similarity`")
    prefix: str = Field("", description="in front of both texts, for encoders that were trained with one")
    words: Annotated[tuple[Positive, Positive] | None, Field(description="[least, most], for `length`")] = (
        None
    )
    required: Source = Field("", description="a list of words, one a line, for `required`")

    @model_validator(mode="after")
    def _measures_something(self) -> PromptTextOptions:
        if not (self.encoder or self.words or self.required):
            raise ValueError("give at least one of `encoder`, `words` and `required`")
        if self.words is not None and self.words[0] > self.words[1]:
            raise ValueError(f"words {list(self.words)}: write [least, most]")
        return self


class PromptText:
    """The builder, and the reward (`PromptReward`); its score is the mean of the dimensions.

    Raises:
        CheckpointError: the encoder cannot be loaded.
        KeywordFileError: the list of words cannot be read.
    """

    Options = PromptTextOptions
    version = "1"
    checkpoints = ("encoder",)

    def __init__(self, settings: Modelled, options: PromptTextOptions) -> None:
        self.options = options
        self._required = KeywordList.read(options.required) if options.required else None
        self._encoder = None
        if options.encoder:
            from vpo_ray.engines.reward.sentence_encoder import SentenceEncoder

            device = getattr(settings, "device", "cpu")
            self._encoder = SentenceEncoder("options.encoder", options.encoder, device)

    @staticmethod
    def problems(settings: Modelled, options: PromptTextOptions) -> Iterator[str]:
        yield from unused_keys(settings, "text", "device")
        if options.required and "://" not in options.required:
            try:
                KeywordList.read(options.required)
            except KeywordFileError as error:
                yield f"options.required: {error}"

    @staticmethod
    def dimensions(settings: Modelled, options: PromptTextOptions) -> list[str]:
        named = {"similarity": options.encoder, "length": options.words, "required": options.required}
        return [name for name, given in named.items() if given]

    def score_prompts(self, prompts: Sequence[str], queries: Sequence[str]) -> list[Scored | Exception]:
        """The dimensions of every prompt, each 1 at best.

        `similarity`: the cosine of its vector and the query's. `length`: 1 within the bounds, else the share
        of the nearer bound that it has, or that has of it. `required`: the share of the list's words in the
        query that are in the prompt; 1 where the query has none.
        """
        return [self._one(*pair) for pair in zip(prompts, queries, strict=True)]

    def _one(self, prompt: str, query: str) -> Scored | Exception:
        if not prompt.strip():
            return RewardError("the prompt is empty")
        dimensions = {}
        if self._encoder is not None:
            vectors = self._encoder.encode([f"{self.options.prefix}{text}" for text in (prompt, query)])
            dimensions["similarity"] = float(vectors[0] @ vectors[1])
        if self.options.words is not None:
            dimensions["length"] = _within(word_count(prompt), *self.options.words)
        if self._required is not None:
            words = self._required.find_all(query)
            kept = sum(KeywordList([word]).find(prompt) is not None for word in words)
            dimensions["required"] = kept / len(words) if words else 1.0
        return Scored([], dimensions, sum(dimensions.values()) / len(dimensions))


def _within(number: int, least: int, most: int) -> float:
    return min(1.0, number / least, most / max(number, 1))
