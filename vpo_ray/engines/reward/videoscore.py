"""VideoScore v1 and v1.1 (TIGER-AI-Lab, arXiv 2406.15252): five marks of a video, about 1 to 4 each.

An Idefics2 reads frames and a prompt that it was trained with; a linear head on its last token gives the
marks. Prompt-A-Video takes v1. `query_prompt` is a file with the text of upstream's `REGRESSION_QUERY_PROMPT`
(`examples/run_videoscore.py`), from its first line feed to its last, with `{text_prompt}` for the query.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.engines.reward.weights_hash import weights_hash
from vpo_ray.files.text_files import read_text
from vpo_ray.recipe import Reward
from vpo_ray.recipe.base import Positive, Source

log = logging.getLogger(__name__)

# In the order of the head's rows.
DIMENSIONS = (
    "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency",
)  # fmt: skip
SLOT = "{text_prompt}"
# sha256 of the published text, its first 16 digits.
QUERY_PROMPT_HASH = "49b386d9ea300376"
# Frames at most, of upstream's script.
MOST_FRAMES = {"v1": 16, "v1.1": 48}


class VideoScoreOptions(BaseModel):
    version: Literal["v1", "v1.1"] = "v1"
    query_prompt: Source = Field(description="a file with upstream's REGRESSION_QUERY_PROMPT")
    frames: Positive | None = Field(None, description="at most so many; 16 for v1 and 48 for v1.1 when unset")

    @property
    def most(self) -> int:
        return self.frames or MOST_FRAMES[self.version]


class QueryPromptError(ValueError):
    """A query prompt that cannot be used; the message says why."""

    stops_run = True  # see stream/stops.py


class VideoScore:
    """The builder. Dimensions are raw; the score is their mean.

    Raises:
        CheckpointError: `model` is no VideoScore.
        TextFileError: there is no such query prompt.
        QueryPromptError: it has no place for the query.
    """

    Options = VideoScoreOptions
    version = "1"
    checkpoints = ("model",)
    dimensions = DIMENSIONS

    def __init__(self, settings: Reward, options: VideoScoreOptions) -> None:
        prompt = read_query_prompt(options.query_prompt)
        # It imports torch, and every command that reads the recipe imports this module.
        from vpo_ray.engines.reward.videoscore_model import VideoScoreScorer

        self._scorer = VideoScoreScorer(settings, DIMENSIONS, prompt, SLOT, options.most)
        self.pick = self._scorer.pick

    @staticmethod
    def problems(settings: Reward, options: VideoScoreOptions) -> Iterator[str]:
        yield from unused_keys(settings, "videoscore", "model dtype device")

    @staticmethod
    def identity(settings: Reward, options: VideoScoreOptions) -> str:
        """The weights, the dtype, which frames, the rule of positions, and the query prompt."""
        prompt = prompt_hash(read_text(options.query_prompt))
        return (
            f"{options.version}, weights {weights_hash(settings.model)}, {settings.dtype}, at most "
            f"{options.most} spread frames, positions in float32, query prompt {prompt}"
        )

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """See `RewardModel.score`."""
        return self._scorer.score(videos, queries)


def read_query_prompt(path: str) -> str:
    """The text of the file, as it is. Another than the published one is used with a warning.

    Raises:
        TextFileError: there is no such file, or it is no text.
        QueryPromptError: it does not have `{text_prompt}` once.
    """
    prompt = read_text(path)
    if prompt.count(SLOT) != 1:
        raise QueryPromptError(
            f"options.query_prompt: {path} has {SLOT} {prompt.count(SLOT)} times, not once"
        )
    if (found := prompt_hash(prompt)) != QUERY_PROMPT_HASH:
        log.warning(
            "%s has the hash %s, and VideoScore's own prompt %s: marks are not those of published weights "
            "(white space at the ends counts)",
            path,
            found,
            QUERY_PROMPT_HASH,
        )
    return prompt


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]
