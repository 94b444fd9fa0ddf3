"""What the model reads: token ids and positions of a video and the questions about it.

A sequence is [bos][frames][question]. Frames and bos are the prefix that all questions share, so
one pass lays out [prefix][question 1]...[question N], each question starting at the position
after the prefix. Templates and positions are those of CogVLM2-Video's own input builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpo_ray.engines.reward import RewardError

Template = Literal["chat", "vqa", "base"]
_TEXT = {"chat": "Question: {} Answer:", "vqa": "Question: {} Short answer:", "base": "{}"}


@dataclass(frozen=True)
class Tokens:
    """Ids, positions and which of them are places for vision tokens; all of one length."""

    ids: list[int]
    positions: list[int]
    vision: list[bool]


@dataclass(frozen=True)
class Layout:
    """One video and its questions in one row: `questions` are [start, end) ranges after the
    prefix, whose tokens are 0 to `prefix`."""

    tokens: Tokens
    prefix: int
    questions: list[tuple[int, int]]

    @property
    def last(self) -> list[int]:
        """Index of each question's last token, where its answer is read."""
        return [end - 1 for _, end in self.questions]


def prefix(tokenizer: Any, template: Template, frames: int, frame_tokens: int, placeholder: int) -> Tokens:
    """bos and the frames; `chat` writes each frame's index as text after it."""
    ids, vision = [tokenizer.bos_token_id], [False]
    for i in range(frames):
        index = _encode(tokenizer, str(i)) if template == "chat" else []
        ids += [placeholder] * frame_tokens + index
        vision += [True] * frame_tokens + [False] * len(index)
    return Tokens(ids, positions(vision), vision)


def positions(vision: Sequence[bool]) -> list[int]:
    """Positions of a prefix: in a run of vision tokens all but the first (boi) and the last (eoi)
    share one. Without text between frames they form one run, as in the reference's `base`."""
    # Text follows a prefix, so that its last vision token is always the end of a run.
    padded = [False, *vision, False]
    inner = [all(padded[i : i + 3]) for i in range(len(vision))]
    result, position = [], -1
    for i, is_inner in enumerate(inner):
        position += not (is_inner and i > 0 and inner[i - 1])
        result.append(position)
    return result


def layout(
    tokenizer: Any, template: Template, before: Tokens, questions: Sequence[str], limit: int
) -> Layout:
    """One row of the prefix and all questions, each restarting after the prefix's last position.

    Raises:
        RewardError: a question reaches beyond the model's `limit` positions.
    """
    ids, places, ranges = list(before.ids), list(before.positions), []
    first = before.positions[-1] + 1
    for number, question in enumerate(questions, 1):
        text = _encode(tokenizer, _TEXT[template].format(question))
        if first + len(text) > limit:
            raise RewardError(
                f"question {number} has {len(text)} tokens after {first} positions of video, together "
                f"{first + len(text)}; the model has {limit} positions: shorten the query"
            )
        ranges.append((len(ids), len(ids) + len(text)))
        ids += text
        places += range(first, first + len(text))
    vision = before.vision + [False] * (len(ids) - len(before.ids))
    return Layout(Tokens(ids, places, vision), len(before.ids), ranges)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
