"""Text of users in questions to LLMs: material, that no text can turn into a part of the question."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

QUOTES = "\"'`“”„«»‘’‚「」『』"


def fill(template: str, blocks: Mapping[str, str] | None = None, /, **values: str) -> str:
    """Put values into `{name}` slots as JSON strings, in one pass, so that a value's own braces
    are never read as slots and nothing in it can end the string, open a tag or spell a control
    token (all known ones begin with `<` or `[`, and an endpoint may take them from text). Quotation
    marks around such a slot are the string's own. Blocks are texts that `fill` made: they go in as
    they are."""
    encoded = {f"{{{name}}}": text for name, text in (blocks or {}).items()}
    strings = {f"{{{name}}}": quoted(value) for name, value in values.items()}
    slots = "|".join([*map(in_quotes, strings), *map(re.escape, encoded)])
    return re.sub(slots, lambda match: (strings | encoded)[match[0].strip(QUOTES)], template)


def in_quotes(slot: str) -> str:
    """A pattern of a slot, with the quotation marks around it where there are some."""
    return rf"[{QUOTES}]{re.escape(slot)}[{QUOTES}]|{re.escape(slot)}"


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("[", "\\u005b")
