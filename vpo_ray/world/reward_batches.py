"""Batches for the training of the small world's reward: clips, queries about them, and rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vpo_ray.engines.reward import checkpoint, sequence
from vpo_ray.engines.reward.frames import preprocess
from vpo_ray.world.language import query
from vpo_ray.world.questions import CHECKS
from vpo_ray.world.reward_clips import Clips
from vpo_ray.world.scene import ATTRIBUTES, NAMED

ASKED = [check.key for check in CHECKS if check.key in NAMED]  # the first of CHECKS
# Of each clip: queries, each with all questions about it, and questions without a query.
_QUERIES, _FREE = 3, 3


@dataclass(frozen=True)
class Batch:
    """Clips with a query each, as tensors.

    Args:
        pixels: (clips * 5, 3, side, side).
        seen, free, course: as in `Clips`.
        named: (clips, queries, asked questions), index of the value that a query names; the number of values
            where it names none.
        answers: (clips, questions), 1 yes, 0 no, -1 between: of those without a query, then each query's.
        layouts: one for each clip.
    """

    pixels: torch.Tensor
    seen: torch.Tensor
    free: torch.Tensor
    course: torch.Tensor
    named: torch.Tensor
    answers: torch.Tensor
    layouts: list[sequence.Layout]


class _Tokens:
    """The tokenizer without what takes time around it."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token_id, inner = tokenizer.bos_token_id, tokenizer.backend_tokenizer
        self.encode = lru_cache(1 << 14)(lambda text, **rest: inner.encode(text, **rest).ids)


class Reader:
    """Makes batches of clips and queries."""

    def __init__(self, tokenizer: Any, config: checkpoint.Config, seed: int) -> None:
        self.tokens, self.config = _Tokens(tokenizer), config
        self.yes, self.no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        self.rng = np.random.default_rng(seed)
        frame_tokens, pad = config.vision.frame_tokens, config.pad_token_id
        self.before = sequence.prefix(self.tokens, "chat", 5, frame_tokens, pad)

    def batch(self, clips: Clips, chosen: np.ndarray) -> Batch:
        """Of each of the chosen clips, questions without a query and queries: what was asked for, and others
        with attributes changed from what is seen."""
        layouts, named, answers = [], [], []
        limit = self.config.max_position_embeddings
        for clip in chosen.tolist():
            free = len(ASKED) + self.rng.permutation(len(CHECKS) - len(ASKED))[:_FREE]
            texts, right, told = [CHECKS[i].text for i in free], list(clips.free[clip, free]), []
            for change in (0.0, *[0.4] * (_QUERIES - 1)):
                asked = query(clips.scene(clip, change, self.rng), self.rng, names=(1, 4))
                texts += [check.ask(asked.text) for check in CHECKS[: len(ASKED)]]
                right += list(clips.answers(clip, asked.named)[: len(ASKED)])
                told.append([_value(key, asked.named.get(key)) for key in ASKED])
            layouts.append(sequence.layout(self.tokens, "chat", self.before, texts, limit))
            answers.append(right)
            named.append(told)
        frames = torch.from_numpy(clips.frames[chosen]).flatten(0, 1)
        seen, free, course = (torch.from_numpy(a[chosen]) for a in (clips.seen, clips.free, clips.course))
        return Batch(
            preprocess(frames, self.config.vision.image_size).bfloat16(),
            seen,
            free,
            course,
            torch.tensor(named),
            torch.from_numpy(np.array(answers)),
            layouts,
        )


def _value(key: str, value: str | None) -> int:
    return len(ATTRIBUTES[key]) if value is None else ATTRIBUTES[key].index(value)
