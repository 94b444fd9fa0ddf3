"""The JSON schema of a recipe, for editors and other tools: `vpo schema > recipe.schema.json`.

It comes from the sections themselves. A key's meaning is its description beside the key, or a line of
`data/meanings.yaml`; its unit follows from its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from vpo_ray.recipe import Recipe
from vpo_ray.recipe.base import Section

SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"
_MEANINGS = Path(__file__).parents[1] / "data" / "meanings.yaml"

# The unit of a key, by what its name looks like; the first that fits.
_UNITS = (
    (r"timeout|\w+_s", "seconds"),
    (r"(prompt|completion)_price", "money for a million tokens"),
    (r"\w+_price|max_cost", "money"),
    (r"\w+_per_minute", "a minute"),
    (r"fps", "frames a second"),
    (r"height|width", "pixels"),
    (r"\w*_chars", "characters"),
    (r"(min|max)_words|word_limit", "words"),
    (r"max_tokens|max_model_len|max_length|micro_tokens|max_text_tokens", "tokens"),
    (r"chosen_drop|end_drop", "nats"),
    (r"epochs", "epochs"),
    (r"(min|max)_rows|global_batch|micro_batch|batch_size", "rows"),
    (r"save_steps|steps", "steps"),
)


def recipe_schema() -> dict[str, Any]:
    """The schema, with a description of every key, and its unit as `x-unit`."""
    schema = Recipe.model_json_schema()
    classes = recipe_sections()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        if "description" in section:
            section["description"] = " ".join(section["description"].split())
        for key, entry in section.get("properties", {}).items():
            entry.pop("title", None)
            if text := meaning(classes[name], key):
                entry["description"] = text
            if (unit := unit_of(key)) and _is_number(entry):
                entry["x-unit"] = unit
    return {"$schema": SCHEMA_URI, **schema}


def recipe_sections() -> dict[str, type[Section]]:
    """Every section that a recipe may have, by the name of its class."""
    found: dict[str, type[Section]] = {}
    for section in _below(Recipe):
        found.setdefault(section.__name__, section)
    return found


def section_paths() -> dict[str, list[str]]:
    """Where each section may be in a recipe, by the name of its class. `*` is a name that the user gives."""
    found: dict[str, list[str]] = {}

    def note(section: type[Section], prefix: str) -> None:
        for key, field in section.model_fields.items():
            named = set(_named(field.annotation))
            for inner in _inside(field.annotation):
                path = f"{prefix}{key}.*" if inner in named else f"{prefix}{key}"
                found.setdefault(inner.__name__, []).append(path)
                note(inner, f"{path}.")

    note(Recipe, "")
    return found


def meaning(section: type[Section], key: str) -> str:
    """What a key means; empty where neither the section nor a base of it says so."""
    own = section.model_fields[key].description
    noted = (_meanings().get(base.__name__, {}).get(key) for base in section.__mro__)
    return own or next(filter(None, noted), "")


def unit_of(key: str) -> str:
    """The unit of a key's number; empty where it has none."""
    return next((unit for pattern, unit in _UNITS if re.fullmatch(pattern, key)), "")


@cache
def _meanings() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = yaml.safe_load(_MEANINGS.read_text("utf-8"))
    return found


def _below(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for inner in _inside(field.annotation):
            yield from _below(inner)


def _inside(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a key's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _inside(part)


def _named(annotation: Any) -> Iterator[type[Section]]:
    """Those of them that are under names of the user's."""
    inside = _inside if get_origin(annotation) is dict else _named
    for part in get_args(annotation):
        yield from inside(part)


def _is_number(entry: dict[str, Any]) -> bool:
    return any(one.get("type") in ("integer", "number") for one in (entry, *entry.get("anyOf", ())))
