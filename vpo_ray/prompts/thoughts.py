"""Thoughts of reasoning models in the text of an answer, and how they are removed.

A thought has a mark at its start and one at its end. Where the chat template writes the first, an answer has
only the second, and everything before it is a thought.
"""

from __future__ import annotations

import re
from typing import Any

_NAMES = "(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|inner_monologue)"
# <think>, <seed:think>, <think:x>; Magistral; Kimi; Cohere and others; harmony's channels, and what is left
# of them without special tokens; Gemma; Granite.
_OPEN = rf"""
    <(?:\w+:)?{_NAMES}(?::\w+)?\s*> | \[THINK\] | ◁think▷
    | <\|(?:START_THINKING|begin_of_thought|think(?:ing)?|inner_prefix)\|>
    | <\|open\|>\s*think\s*<\|sep\|>
    | <\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|> | \Aanalysis(?=[A-Z"'])
    | <\|channel>thought | <unused94>(?:thought)?
    | \A\s*Here(?:'s|\ is)\ my\ thought\ process:
"""
_CLOSE = rf"""
    </(?:\w+:)?{_NAMES}(?::\w+)?\s*> | \[/THINK\] | ◁/think▷
    | <\|(?:END_THINKING|end_of_thought|/think(?:ing)?|inner_suffix)\|>
    | <\|close\|>\s*think\s*<\|sep\|>
    | <\|channel\|>\s*final[^<]*<\|message\|> | (?<=\w|[.!?)"'])assistantfinal
    | <channel\|> | <unused95>
    | Here(?:'s|\ is)\ my\ response:
"""
_FLAGS = re.VERBOSE | re.IGNORECASE
_MARKS = re.compile(f"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", _FLAGS)
_OPENED = re.compile(rf"(?:{_OPEN})\s*\Z", _FLAGS)
# What some models put around the answer after their thought.
_FRAME = re.compile(
    r"""\A(?:\s|<\|(?:START_RESPONSE|START_TEXT|begin_of_solution)\|>|<\|open\|>\s*response\s*<\|sep\|>
        |<(?:answer|response|output|assistant)>)+
      | (?:\s|<\|(?:END_RESPONSE|END_TEXT|end_of_solution|return|end|eot|eom|im_end|eot_id|endoftext)\|>
        |<\|close\|>\s*\w+\s*<\|sep\|>|</(?:answer|response|output|assistant)>)+\Z""",
    _FLAGS,
)
# The end of a piece of text that may be the start of a mark.
_PART = re.compile(r"(?:<\|[^\n]{0,60}|[<\[◁][^>\]▷\n]{0,40})\Z")
_BEGINNINGS = ("analysis.", "here is my thought process:", "here's my thought process:")

# Tokens at the end of a prompt where a template may have opened a thought.
TAIL = 32


class UnclosedThought(ValueError):
    """An answer that ends within a thought."""


def without_thoughts(text: str) -> str:
    """The text of an answer outside its thoughts; text without any is returned as it is.

    Raises:
        UnclosedThought: the last thought has no end, so there is no answer.
    """
    if not _may_hold_marks(text):
        return text
    kept: list[str] = []
    start, inside = 0, False
    for mark in _MARKS.finditer(text):
        if mark["open"] is None:
            if not inside:
                kept = []
            start, inside = mark.end(), False
        elif not inside:
            kept.append(text[start : mark.start()])
            inside = True
    if inside:
        raise UnclosedThought("the answer ends within a thought: raise max_tokens, or turn thinking off")
    if not start:
        return text
    return _FRAME.sub("", "".join([*kept, text[start:]]))


def is_spoken(before: str, after: str) -> bool:
    """Whether the text between two pieces of an answer is outside its thoughts."""
    try:
        without_thoughts(before)
    except UnclosedThought:
        return False
    mark = _MARKS.search(after) if _may_hold_marks(after) else None
    return mark is None or mark["close"] is None


class Spoken:
    """Takes the thoughts out of an answer that arrives in pieces. Text is passed on as it arrives until a
    mark is seen, and the rest at the end."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._passed: list[str] = []
        self._held = ""
        self._thinks = False

    def feed(self, piece: str) -> str:
        """The text that can be passed on now. What may be the beginning of a mark is held back."""
        self._pieces.append(piece)
        if self._thinks:
            return ""
        self._held += piece
        self._thinks = _may_hold_marks(self._held) and _MARKS.search(self._held) is not None
        beginning = "" if self._passed else self._held[:80].lstrip().lower()
        if self._thinks or (not self._passed and any(known.startswith(beginning) for known in _BEGINNINGS)):
            return ""
        part = _PART.search(self._held, max(0, len(self._held) - 64))
        cut = part.start() if part is not None else len(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        if ready:
            self._passed.append(ready)
        return ready

    def end(self) -> str:
        """The rest. Raises UnclosedThought where the answer ends within a thought."""
        if not self._thinks:
            return self._held
        whole, passed = without_thoughts("".join(self._pieces)), "".join(self._passed)
        # Text of a thought that the template opened may have been passed on already.
        return whole[len(passed) :] if whole.startswith(passed) else whole


def _may_hold_marks(text: str) -> bool:
    """False for most texts, a thousand times faster than searching for marks."""
    words = ("<", "[", "◁", "assistantfinal", "my response:", "my thought process:")
    return text.startswith("analysis") or any(word in text for word in words)


def opened_thought(prompt: str) -> str:
    """The mark at the end of a prompt whose template opened a thought, or ""."""
    mark = _OPENED.search(prompt)
    return mark[0] if mark is not None else ""


def marks_among(tokenizer: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of a tokenizer's special tokens that are marks of thoughts, and of the others. Text decoded without
    special tokens does not show where a thought ends."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = frozenset(id for id, content in special.items() if _MARKS.fullmatch(content))
    return marks, frozenset(special) - marks
