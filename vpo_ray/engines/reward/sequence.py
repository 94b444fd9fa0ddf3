"""The model's input: token ids and positions of a video and the questions about it.

A sequence is [bos][frames][question]. All questions share the prefix of bos and frames, and questions that
begin alike ("Is the ...") share their beginnings too: one row has the prefix and then the tree of questions,
each token at the position that it has in its own sequence. Templates and positions are those of
CogVLM2-Video's own input builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vpo_ray.engines.reward import RewardError

Template = Literal["chat", "vqa", "base"]
TEXT = {"chat": "Question: {} Answer:", "vqa": "Question: {} Short answer:", "base": "{}"}


@dataclass(frozen=True)
class Tokens:
    """Ids, positions, and which are placeholders of vision tokens; all of the same length."""

    ids: list[int]
    positions: list[int]
    vision: list[bool]


class QuestionChain(NamedTuple):
    """Tokens [start, end) that some questions share, and the chain before them."""

    start: int
    end: int
    parent: int | None


@dataclass(frozen=True)
class Layout:
    """One video and its questions in one row.

    Args:
        prefix: the tokens 0 to `prefix` are the video's.
        chains: the tree of questions after them, every parent before its children.
        last: index of each question's last token, where its answer is read.
    """

    tokens: Tokens
    prefix: int
    chains: list[QuestionChain]
    last: list[int]

    def ancestors(self, chain: int) -> list[int]:
        """The chains before this one, in order."""
        found: list[int] = []
        parent = self.chains[chain].parent
        while parent is not None:
            found.append(parent)
            parent = self.chains[parent].parent
        return found[::-1]

    def question(self, number: int) -> list[int]:
        """Indices of all tokens of a question, `number` counted from 0."""
        end = self.last[number]
        own = next(i for i, chain in enumerate(self.chains) if chain.start <= end < chain.end)
        before = [i for a in self.ancestors(own) for i in range(*self.chains[a][:2])]
        return [*before, *range(self.chains[own].start, end + 1)]


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
    """One row of the prefix and the tree of all questions, which restart after its last position.

    Raises:
        RewardError: a question reaches beyond the model's `limit` positions.
    """
    first = before.positions[-1] + 1
    texts = []
    for number, question in enumerate(questions, 1):
        text = _encode(tokenizer, TEXT[template].format(question))
        if first + len(text) > limit:
            raise RewardError(
                f"question {number} has {len(text)} tokens after {first} positions of video, together "
                f"{first + len(text)}; the model has {limit} positions: shorten the query"
            )
        texts.append(text)
    ids, places = list(before.ids), list(before.positions)
    chains, last = _grow(texts, first, ids, places)
    vision = before.vision + [False] * (len(ids) - len(before.ids))
    return Layout(Tokens(ids, places, vision), len(before.ids), chains, last)


class _Node:
    """A token of the tree, with the questions that end in it."""

    __slots__ = ("children", "ends")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.ends: list[int] = []


def _grow(
    texts: Sequence[Sequence[int]], first: int, ids: list[int], places: list[int]
) -> tuple[list[QuestionChain], list[int]]:
    """Append the tree of token sequences to `ids` and `places`; returns its chains and the index of
    each sequence's last token."""
    root = _Node()
    for number, text in enumerate(texts):
        node = root
        for token in text:
            node = node.children.setdefault(token, _Node())
        node.ends.append(number)
    chains: list[QuestionChain] = []
    last = [0] * len(texts)
    open_: list[tuple[int, _Node, int | None]] = []
    open_ += [(t, n, None) for t, n in root.children.items()][::-1]
    while open_:
        token, node, parent = open_.pop()
        start = len(ids)
        place = first if parent is None else places[chains[parent].end - 1] + 1
        while True:
            ids.append(token)
            places.append(place + len(ids) - 1 - start)
            for number in node.ends:
                last[number] = len(ids) - 1
            if len(node.children) != 1:
                break
            ((token, node),) = node.children.items()
        chains.append(QuestionChain(start, len(ids), parent))
        own = len(chains) - 1
        open_ += [(t, n, own) for t, n in node.children.items()][::-1]
    return chains, last


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
