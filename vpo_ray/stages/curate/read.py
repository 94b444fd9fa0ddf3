"""Read raw queries: rows of files as batches of RAW; one bad row costs itself only.

`input_files` says where files may be, `record_files` of which kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from vpo_ray.files.input_files import InputError, InputFile, find_files
from vpo_ray.files.record_files import READERS, Unreadable, records
from vpo_ray.recipe import Queries
from vpo_ray.records import normalise
from vpo_ray.stages.curate.rules import KEPT, reason_code, visible

__all__ = ["EXCERPT", "RAW", "InputError", "InputFile", "query_files", "read_batches", "text_of"]

RAW = pa.schema(
    [
        pa.field("file", pa.int32()),  # position in the list of files
        pa.field("row", pa.int64()),  # from 1
        pa.field("text", pa.large_string()),  # the normalised query; of a dropped row, an excerpt
        pa.field("reason", pa.int8()),  # why it is dropped: a position in rules.REASONS
        pa.field("unsafe", pa.bool_()),  # null: not labelled
        pa.field("image", pa.large_string()),  # as the row names it; prepared, its name in the store
    ]
)
ROWS_PER_BATCH, CHARS_PER_BATCH = 5_000, 4_000_000
EXCERPT = 200
_TRUE, _FALSE = {"true", "yes", "unsafe"}, {"false", "no", "safe"}


def query_files(settings: Queries) -> list[InputFile]:
    """The files that `queries.path` names; see `input_files.find_files`.

    Raises:
        InputError: nothing there, a filesystem that cannot be opened, or a kind that is not known.
    """
    files = find_files(settings.path, "queries.path", READERS)
    for file in files:
        if file.kind == ".txt" and settings.unsafe_columns:
            raise InputError(f"queries.path {file}: a text file has no columns, see queries.unsafe_columns")
        if file.kind == ".txt" and settings.image_column is not None:
            raise InputError(f"queries.path {file}: a text file has no columns, see queries.image_column")
    return files


def read_batches(files: Sequence[InputFile], position: int, settings: Queries) -> Iterator[pa.Table]:
    """The rows of one file as tables of RAW.

    Raises:
        InputError: the file cannot be read, or it has no such column.
    """
    image = [settings.image_column] if settings.image_column is not None else []
    columns = [settings.column, *image, *settings.unsafe_columns]
    rows: list[tuple[Any, ...]] = []
    chars = 0
    for number, values in enumerate(records(files[position], columns, "queries.path"), start=1):
        row = (position, number, *_accept(values, settings))
        rows.append(row)
        chars += len(row[2] or "")
        if len(rows) == ROWS_PER_BATCH or chars > CHARS_PER_BATCH:
            yield _table(rows)
            rows, chars = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW
    )


# From a row to its text, or the reason to drop it


def _accept(values: Any, settings: Queries) -> tuple[str | None, int, bool | None, str | None]:
    """Text (of a dropped row, an excerpt), reason, label and image of one row."""
    value, *labels = values if isinstance(values, tuple) else (values,)
    named = labels.pop(0) if labels and settings.image_column is not None else None
    text, reason = text_of(value, settings)
    unsafe = image = None
    if reason == KEPT:
        try:
            image = path_of_image(named)
        except ValueError:
            value, reason = named, reason_code("no path of an image")
    if reason == KEPT:
        try:
            unsafe = _label(labels, settings.unsafe_threshold)
        except ValueError:
            reason = reason_code("bad unsafe label")
    return (text if reason == KEPT else _excerpt(value)), reason, unsafe, image


def text_of(value: Any, settings: Queries) -> tuple[str, int]:
    """The normalised query of a value, and KEPT or why it is dropped: a position in rules.REASONS."""
    if value is None:
        return "", reason_code("null")
    if isinstance(value, Unreadable):
        return "", reason_code(value.reason)
    if not isinstance(value, str):
        return "", reason_code("not text")
    try:
        text = normalise(value)
    except UnicodeEncodeError:
        return "", reason_code("invalid UTF-8")
    if "\x00" in text:
        return "", reason_code("binary")
    if not visible(text):
        return "", reason_code("empty")
    if len(text) > settings.max_chars:
        return "", reason_code("too long")
    if len(text) < settings.min_chars:
        return "", reason_code("too short")
    return text, KEPT


def path_of_image(value: Any) -> str | None:
    """The path or URI of an image, None where a row has none. Raises ValueError for another value."""
    if value is None:
        return None
    if not isinstance(value, str) or "\x00" in value:
        raise ValueError("no path")
    value.encode("utf-8")
    return value.strip() or None


def _label(values: Iterable[Any], threshold: float) -> bool | None:
    """Unsafe if any label says so, None where none says anything. Raises ValueError for another value."""
    said: bool | None = None
    for value in values:
        if isinstance(value, str):
            word = value.strip().lower()
            value = None if not word else True if word in _TRUE else False if word in _FALSE else float(word)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise ValueError("no label")
        said = bool(said) or (value if isinstance(value, bool) else value >= threshold)
    return said


def _excerpt(value: Any) -> str | None:
    if value is None:
        return None
    raw = (
        value.raw[:EXCERPT]
        if isinstance(value, Unreadable)
        else str(value)[:EXCERPT].encode("utf-8", "replace")
    )
    return raw.decode("utf-8", "replace")
