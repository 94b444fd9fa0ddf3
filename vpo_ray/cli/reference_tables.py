"""Commands and tables for the page of `vpo schema --markdown`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = Path(__file__).parents[1] / "data" / "columns.yaml"


def command_pages(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every command with its options, as lines of Markdown."""
    yield "## Commands"
    yield ""
    for name, command in _commands(parser).items():
        yield f"**`vpo {name}`**: {command.description}"
        yield ""
        nested = _commands(command)
        rows = [
            _option(action) for action in command._actions if not isinstance(action, argparse._HelpAction)
        ]
        rows += [(f"`{inner} …`", sub.description or "") for inner, sub in nested.items()]
        for given, text in [row for row in rows if row[0]]:
            yield f"- {given}: {text}" if text else f"- {given}"
        yield ""


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def _option(action: argparse.Action) -> tuple[str, str]:
    if isinstance(action, argparse._SubParsersAction):
        return "", ""
    values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
    value = "" if action.nargs == 0 else f" {values}"
    name = (
        ", ".join(action.option_strings) + value
        if action.option_strings
        else str(action.metavar or action.dest)
    )
    text = (
        (action.help or "")
        .replace("%(default)s", str(action.default))
        .replace("%(default)g", str(action.default))
    )
    return f"`{name}`", text.replace("%%", "%")


def table_schemas() -> dict[str, pa.Schema]:
    """The tables of a run directory, by their folder."""
    from vpo_ray import records

    return {
        "queries": records.QUERY,
        "dropped": records.DROPPED,
        "labels": records.LABEL,
        "drafts": records.DRAFT,
        "sft": records.SFT,
        "evolutions": records.EVOLUTION,
        "feedback": records.FEEDBACK,
        "pairs": records.PAIR,
        "groups": records.GROUP,
        "preferences": records.PREFERENCE,
    }


def meanings_of_columns() -> dict[str, dict[str, str]]:
    """What columns mean: `columns` for all tables, and by table what differs and what a row is (`rows`)."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(_COLUMNS.read_text("utf-8"))
    return {"columns": found["columns"], **found["tables"]}


def table_pages() -> Iterator[str]:
    """Every table with its columns, as lines of Markdown."""
    meanings = meanings_of_columns()
    yield "## Tables"
    yield ""
    yield "Folders of Parquet parts in the run directory. Ids are functions of content, so a row has the same"
    yield "id in every run that makes it."
    yield ""
    for name, schema in table_schemas().items():
        own = meanings[name]
        yield f"### {name}/"
        yield ""
        yield f"A row is {own['rows']}."
        yield ""
        yield "| column | type | null | meaning |"
        yield "|---|---|---|---|"
        for field in schema:
            meaning = own.get(field.name) or meanings["columns"][field.name]
            null = "yes" if field.nullable else ""
            yield f"| `{field.name}` | {_type_of(field.type)} | {null} | {meaning} |"
        yield ""


def _type_of(kind: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_list(kind):
        return f"list of {_type_of(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "struct of " + ", ".join(f"{field.name}" for field in kind)
    return str(kind)
