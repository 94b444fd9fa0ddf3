"""User text in prompts for LLMs, quoted so that no text can become a part of the instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

QUOTES = "\"'`“”„«»‘’‚「」『』"


def fill(template: str, blocks: Mapping[str, str] | None = None, /, **values: str) -> str:
    """Put values into `{name}` slots as JSON strings, in one pass.

    A value's own braces are never read as slots, and nothing in it can end the string, open a tag or spell a
    control token (all known ones begin with `<` or `[`, and an endpoint may parse them from text). Quotation
    marks around a slot are replaced by the string's own. Blocks are texts made by `fill`, inserted as they
    are.
    """
    encoded = {f"{{{name}}}": text for name, text in (blocks or {}).items()}
    strings = {f"{{{name}}}": quoted(value) for name, value in values.items()}
    slots = "|".join([*map(in_quotes, strings), *map(re.escape, encoded)])
    return re.sub(slots, lambda match: (strings | encoded)[match[0].strip(QUOTES)], template)


def in_quotes(slot: str) -> str:
    """A pattern for a slot, with any quotation marks around it."""
    return rf"[{QUOTES}]{re.escape(slot)}[{QUOTES}]|{re.escape(slot)}"


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("[", "\\u005b")


def plain(value: str) -> str:
    """A user's text as a template that a model was trained with had it: on one line, without quotation marks
    around it. What could spell a control token is escaped as in `fill`."""
    return " ".join(value.split()).replace("<", "\\u003c").replace("[", "\\u005b")
