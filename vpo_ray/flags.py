"""Generator flags in a user's query: `-ar 16:9`, `--neg blur, text`, `-camera zoom in`.

Users of video services write settings of the generator after their query. Curation moves them to a separate
column, as serving can. Nothing is lost: `join_flags` restores a query. Known are the flags of Pika and
Midjourney, in the forms found in the queries that VPO released.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Flag(NamedTuple):
    """One setting: its name in lower case, without dashes, and its value as the user wrote it."""

    name: str
    value: str


ROUNDS = 16

# Short and mistyped names, and their meaning.
_ALIASES = {
    "m": "motion", "cam": "camera", "camer": "camera", "as": "ar", "aspect": "ar", "negative": "neg",
    "nge": "neg", "no": "neg", "version": "v", "s": "stylize", "q": "quality", "seeds": "seed",
}  # fmt: skip
_NUMBERS = "motion|m|gs|fps|seeds?|w|v|version|stylize|s|quality|q|chaos|niji|iw|weird|size"
_TURN = (
    r"(?:in|out|up|down|left|right|forwards?|backwards?|counter[ -]?clockwise|anti[ -]?clockwise|"
    r"clockwise|acw|ccw|cw|static|still|slow(?:ly)?|fast|\d+(?:\.\d+)?)"
)
_MOVE = rf"(?:(?:zoom|pan|rotate|tilt|orbit|{_TURN})(?![\w:]))"
_GAP = r"[ \t]*[,:=]?[ \t]*"
# A dash inside a word is a hyphen ("slow-motion 4"): there a single dash starts a flag only with a name that
# is not an English word.
_START = r"(?: (?<![\w–—-])[-–—]{1,2} | (?<=\w)(?:--|[–—]) | (?<=\w)-(?=ar|fps|gs|seed|neg) )"
_HEAD = re.compile(
    rf"""
  {_START} (?:
      (?P<ratio>aspect|ar|as) {_GAP} (?P<ratio_value>\d+(?:\.\d+)?[ ]?[:x/][ ]?\d+(?:\.\d+)?) (?![\w:])
    | (?P<number>{_NUMBERS}) {_GAP} (?P<number_value>\d+(?:\.\d+)?) (?![\w:]|\.\d)
    | (?P<camera>camera|camer|cam) {_GAP} (?P<camera_value>{_MOVE}(?:[ ]+{_MOVE})*)
    | (?P<move>(?:zoom|pan|rotate|tilt)[ ]+{_TURN}(?![\w:]))
    | (?P<style>style) {_GAP} (?P<style_value>raw|cute|expressive|original|scenic) (?!\w)
    | (?P<bare>hide|tile) (?!\w)
    | (?P<free>negative|neg|nge|message|(?<=--)no) (?!\w) {_GAP}
  )
  | (?<!\w)(?P<text>Message):[ ](?P<text_value>[^\n–—-]{{1,300}}?[ ]\(Font:[ ][^()\n–—-]{{1,100}}\))
    """,
    re.VERBOSE | re.IGNORECASE,
)
_STOP = re.compile(r"[\n\]]")
_LOOSE = " \t\n,-–—"  # what users put between flags


def split_flags(query: str) -> tuple[str, tuple[Flag, ...]]:
    """A query as its text and its flags, in order.

    What only looks like a flag (no value, or one of the wrong kind) stays text. Taking a flag out may join
    the parts of another, so this repeats until none is left: splitting what `join_flags` made of a split
    gives the same again. What is nested deeper than ROUNDS stays text too: each round reads the whole query.
    """
    flags: list[Flag] = []
    for _ in range(ROUNDS):
        if not (found := list(_find(query))):
            break
        flags += [flag for _, _, flag in found]
        query = _without(query, [(start, end) for start, end, _ in found])
    return query, tuple(flags)


def join_flags(text: str, flags: Sequence[Flag]) -> str:
    """One query: the text, followed by the flags."""
    return " ".join([*([text] if text else []), *(f"-{name} {value}".rstrip() for name, value in flags)])


def _find(query: str) -> Iterator[tuple[int, int, Flag]]:
    """Start, end and content of every flag."""
    heads = list(_HEAD.finditer(query))
    bounds = [*(head.start() for head in heads[1:]), len(query)]
    for head, bound in zip(heads, bounds, strict=False):
        kind = next(name for name in _KINDS if head[name] is not None)
        name, end = head[kind].lower(), head.end()
        if kind == "free":
            # Free text extends to the next flag, the end of the line or of a bracket.
            stop = _STOP.search(query, end, bound)
            end = stop.start() if stop else bound
            value = query[head.end() : end].strip(_LOOSE)
            if not re.search(r"\w", value):
                continue
        elif kind == "move":
            name, value = "camera", head[kind]
        else:
            value = head[f"{kind}_value"] if kind != "bare" else ""
        yield head.start(), end, Flag(_ALIASES.get(name, name), value)


def _without(query: str, spans: list[tuple[int, int]]) -> str:
    """The query without these spans and what separated them."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(query)]
    pieces = [query[end:start].rstrip(_LOOSE) for end, start in zip(ends, starts, strict=True)]
    pieces[1:] = [piece.lstrip(" \t,") for piece in pieces[1:]]
    return " ".join(piece for piece in pieces if piece.strip(_LOOSE + ".")).strip()


_KINDS = ("ratio", "number", "camera", "move", "style", "bare", "free", "text")
