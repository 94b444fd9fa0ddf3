"""`vpo schema`: the JSON schema of a recipe, or with `--markdown` the page docs/reference.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

HELP = "print the JSON schema of a recipe, or a reference of keys, commands, tables and routes"
_HEAD = """\
# Reference

Made by `make reference` from the code. An editor that knows JSON schemas has the same: `vpo schema >
recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` as the recipe's first line.

Any key can be given to a command: `--set render.steps=30`. Sections that are not required may be left out.

## Exit status

| status | of a command |
|---|---|
"""
EXIT_STATUS = {
    0: "done",
    1: "the run failed, or its limits stopped it",
    2: "wrong usage or input: the recipe has to be changed",
    3: "the run is submitted already, or another driver has its directory",
    4: "an evaluation does not pass",
    5: "`vpo plan` alone: the recipe is in order, but files that it names are not on this machine",
    130: "interrupted; what was made is kept, and the same command goes on",
    143: "terminated; what was made is kept, and the same command goes on",
}

_FEW = 6  # places of a section that are listed


def add(parser: argparse.ArgumentParser, vpo: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo schema` its options; the page tells those of all of `vpo`."""
    parser.set_defaults(vpo=vpo)
    parser.add_argument("--markdown", action="store_true", help="a page of all keys, for people")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema or the page."""
    from vpo_ray.recipe.json_schema import recipe_schema

    schema = recipe_schema()
    sys.stdout.write(
        reference(schema, arguments.vpo) if arguments.markdown else json.dumps(schema, indent=2) + "\n"
    )
    return 0


def reference(schema: Mapping[str, Any], vpo: argparse.ArgumentParser) -> str:
    """The page: every section with its keys, their types, defaults, units and meanings; commands; tables;
    routes; metrics."""
    from vpo_ray.cli.reference_serving import metric_pages, route_pages
    from vpo_ray.cli.reference_tables import command_pages, table_pages
    from vpo_ray.recipe.json_schema import recipe_sections, section_paths

    statuses = "".join(f"| {status} | {text} |\n" for status, text in EXIT_STATUS.items())
    parts = [_HEAD + statuses]
    paths, tables = section_paths(), {"Recipe": schema, **schema["$defs"]}
    parts += [
        "\n".join(_section(name, section.__doc__ or "", paths.get(name, []), tables[name])) + "\n"
        for name, section in recipe_sections().items()
    ]
    pages = [*command_pages(vpo), *table_pages(), *route_pages(_section), *metric_pages()]
    return "\n".join([*parts, *pages]).rstrip("\n") + "\n"


def _section(name: str, text: str, paths: list[str], table: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    if paths:
        more = f", and {len(paths) - _FEW} more" if len(paths) > _FEW else ""
        yield f"At {', '.join(f'`{path}`' for path in paths[:_FEW])}{more}."
        yield ""
    # The text of a class, as it is wrapped there.
    yield "\n".join(line.strip() for line in _safe(text).strip().splitlines())
    yield ""
    yield "| key | type | default | unit | meaning |"
    yield "|---|---|---|---|---|"
    needed = table.get("required", ())
    for key, entry in table["properties"].items():
        default = "required" if key in needed else _default(entry)
        said = entry.get("description") or ("see above" if re.search(rf"\b{key}\b", text) else "")
        unit, meaning = entry.get("x-unit", ""), _safe(said)
        yield f"| `{key}` | {_type(entry)} | {default} | {unit} | {meaning} |"


def _safe(text: str) -> str:
    """Text in which Markdown has nothing to see but `code`."""
    return re.sub(r"([<>*|]|(?<!`)_(?=\w))", r"\\\1", text) if "`" not in text else _outside_code(text)


def _outside_code(text: str) -> str:
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else _safe(part) for part in parts)


def _default(entry: Mapping[str, Any]) -> str:
    value = entry.get("default")
    if isinstance(value, dict) and value:
        return "its own defaults"
    return "" if value in (None, {}, []) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(entry: Mapping[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if branches := entry.get("anyOf", entry.get("oneOf")):
        kinds = dict.fromkeys(map(_type, branches))
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in entry or "const" in entry:
        values = entry.get("enum", [entry.get("const")])
        return ", ".join(
            f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`" for value in values
        )
    kind = entry.get("type", "anything")
    if kind == "array":
        items = entry.get("prefixItems")
        return f"[{', '.join(map(_type, items))}]" if items else f"list of {_type(entry.get('items', {}))}"
    if kind == "object":
        inner = entry.get("additionalProperties", True)
        return f"names to {_type(inner)}" if isinstance(inner, Mapping) else "mapping"
    words = {"string": "text", "boolean": "true or false", "integer": "whole number"}
    return words.get(kind, kind) + _bounds(entry)


def _bounds(entry: Mapping[str, Any]) -> str:
    named = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {entry[name]:g}" for name, sign in named if name in entry]
    return f" {', '.join(bounds)}" if bounds else ""
