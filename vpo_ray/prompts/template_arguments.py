"""Arguments of a chat template (`chat_template_kwargs` of a recipe), such as `enable_thinking: false`.

They are written into the template and saved with a checkpoint, as its task prompt is, so that sampling,
training and serving apply the same template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with these arguments set in it."""
    return _block(arguments) + template


def unknown_arguments(template: str, arguments: Mapping[str, Any]) -> list[str]:
    """Arguments that a template does not use."""
    return [name for name in arguments if not re.search(rf"\b{re.escape(name)}\b", template)]


def has_arguments(template: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `with_arguments` wrote exactly these into a template."""
    return _block(arguments) in template


def _block(arguments: Mapping[str, Any]) -> str:
    return "".join(f"{{%- set {name} = {_value(arguments[name])} -%}}" for name in sorted(arguments))


def _value(value: Any) -> str:
    """A JSON value in Jinja syntax."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return literal(value)
    return "none" if value is None else str(value).lower()


def literal(text: str) -> str:
    """A Jinja string literal; Jinja decodes the same escapes as Python."""
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"
