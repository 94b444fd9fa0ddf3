"""Text of users in questions to LLMs: material, that no text can turn into a part of the question."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping


def fill(template: str, blocks: Mapping[str, str] | None = None, /, **values: str) -> str:
    """Put values into `{name}` slots as JSON strings, in one pass, so that a value's own braces
    are never read as slots and nothing in it can end the string, open a tag or spell a control
    token (all known ones begin with `<` or `[`, and an endpoint may take them from text). Blocks
    are texts that `fill` made: they go in as they are."""
    encoded = {**(blocks or {}), **{name: quoted(value) for name, value in values.items()}}
    slots = re.compile("|".join(re.escape(f"{{{name}}}") for name in encoded))
    return slots.sub(lambda match: encoded[match[0][1:-1]], template)


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("[", "\\u005b")
