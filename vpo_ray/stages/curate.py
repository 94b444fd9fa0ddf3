"""Curate: raw user queries become `Query` rows, and every row that does not is counted with a reason.

Reads text (a query a line), JSON (a list), JSONL, CSV and Parquet, streaming; rows that are null,
empty, too long, not text, not UTF-8 or already seen are dropped with that reason.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpo_ray.recipe import Queries, Splits
from vpo_ray.records import SPLITS, Row, content_id, normalise, query_id, share_of

_EXCERPT = 200
Raw = tuple[str, int, Any]  # source, row number, value


class InputError(ValueError):
    """Input that cannot be read at all; the message says which file and what is expected."""


def curate(settings: Queries) -> Iterator[tuple[str, Row]]:
    """Yield ("queries", Query row) or ("dropped", Dropped row) for every input row, in input order.

    The memory held is one 16-byte key per distinct query.

    Raises:
        InputError: no such file, an unknown kind, a wrong column, or no rows at all.
    """
    seen: set[bytes] = set()
    kept = read = 0
    for source, number, value in read_queries(settings):
        read += 1
        text, reason = _accept(value, settings)
        key = query_id(text) if reason is None else ""
        if reason is None and bytes.fromhex(key) in seen:
            reason = "duplicate"
        if reason is None and settings.limit is not None and kept >= settings.limit:
            reason = "over the limit"
        if reason is not None:
            yield (
                "dropped",
                {
                    # Files in two folders may have one name: the count keeps their rows apart.
                    "row_id": content_id(source, number, read),
                    "source": source,
                    "row": number,
                    "reason": reason,
                    "excerpt": _excerpt(value),
                },
            )
            continue
        seen.add(bytes.fromhex(key))
        kept += 1
        yield (
            "queries",
            {
                "query_id": key,
                "query": text,
                "source": source,
                "split": split_of(key, settings.splits),
                "unsafe": None,
            },
        )
    if read == 0:
        raise InputError(f"queries.path {settings.path}: the input holds no rows")


def split_of(query_id: str, splits: Splits) -> str:
    """The split of a query, by its content: stable when other queries come or go."""
    shares = [getattr(splits, name) for name in SPLITS]
    point = share_of("split", query_id) * sum(shares)
    for name, share in zip(SPLITS, shares, strict=True):
        if point < share:
            return name
        point -= share
    return next(name for name, share in zip(SPLITS, shares, strict=True) if share)


def read_queries(settings: Queries) -> Iterator[Raw]:
    """Every value of the query column over all files. Raises InputError."""
    patterns = [settings.path] if isinstance(settings.path, str) else settings.path
    for pattern in patterns:
        literal = Path(pattern).exists() or not glob.has_magic(pattern)
        paths = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise InputError(f"queries.path {pattern}: no file matches")
        for path in paths:
            reader = _READERS.get(Path(path).suffix.lower())
            if reader is None:
                raise InputError(f"queries.path {path}: unknown kind; use one of {', '.join(_READERS)}")
            try:
                for number, value in enumerate(reader(path, settings.column), start=1):
                    yield Path(path).name, number, value
            except OSError as error:
                raise InputError(f"queries.path {path}: {error.strerror or error}") from error
            except (pa.ArrowInvalid, csv.Error) as error:
                raise InputError(f"queries.path {path}: it cannot be read: {error}") from error


def _accept(value: Any, settings: Queries) -> tuple[str, str | None]:
    if value is None:
        return "", "null"
    if isinstance(value, _Unreadable):
        return "", value.reason
    if not isinstance(value, str):
        return "", "not text"
    try:
        text = normalise(value)
    except UnicodeEncodeError:
        return "", "invalid UTF-8"
    if "\x00" in text:
        return "", "binary"
    if not text:
        return "", "empty"
    if len(text) > settings.max_chars:
        return "", "too long"
    if len(text) < settings.min_chars:
        return "", "too short"
    return text, None


class _Unreadable:
    """A row that could not be decoded, kept so that it is counted."""

    def __init__(self, reason: str, raw: bytes) -> None:
        self.reason, self.raw = reason, raw


def _excerpt(value: Any) -> str | None:
    if value is None:
        return None
    raw = (
        value.raw[:_EXCERPT]
        if isinstance(value, _Unreadable)
        else str(value)[:_EXCERPT].encode("utf-8", "replace")
    )
    return raw.decode("utf-8", "replace")


def _lines(path: str) -> Iterator[str | _Unreadable]:
    with open(path, "rb") as file:
        for line in file:
            raw = line.rstrip(b"\r\n")
            try:
                yield raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                yield _Unreadable("invalid UTF-8", raw)


def _text(path: str, column: str) -> Iterator[Any]:
    return _lines(path)


def _field(value: Any, column: str) -> Any:
    """A record's query: the value itself, or its column; a record without it is counted."""
    if not isinstance(value, dict):
        return value
    return value[column] if column in value else _Unreadable("no such column", json.dumps(value).encode())


def _jsonl(path: str, column: str) -> Iterator[Any]:
    for line in _lines(path):
        if isinstance(line, _Unreadable):
            yield line
        elif line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield _Unreadable("not JSON", line.encode())
            else:
                yield _field(value, column)


def _json(path: str, column: str) -> Iterator[Any]:
    raw = Path(path).read_bytes()
    try:
        # Bytes that are no text come as lone surrogates, which `normalise` refuses row by row.
        values = json.loads(raw.decode(json.detect_encoding(raw), "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"queries.path {path}: not a JSON file: {error}") from error
    if not isinstance(values, list):
        raise InputError(
            f"queries.path {path}: expected a JSON list of strings or objects, found {type(values).__name__}"
        )
    yield from (_field(value, column) for value in values)


def _csv(path: str, column: str) -> Iterator[Any]:
    # Bytes that are no UTF-8 come as lone surrogates, as in `_json`.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        if column not in (reader.fieldnames or []):
            raise InputError(f"queries.path {path}: no column {column!r}; it has {reader.fieldnames}")
        while True:
            try:
                record = next(reader, None)
            except csv.Error:
                yield _Unreadable("not CSV", b"")
                continue
            if record is None:
                return
            yield record[column]


def _parquet(path: str, column: str) -> Iterator[Any]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"queries.path {path}: not a Parquet file: {error}") from error
    with file:
        if column not in file.schema_arrow.names:
            raise InputError(f"queries.path {path}: no column {column!r}; it has {file.schema_arrow.names}")
        for batch in file.iter_batches(columns=[column]):
            yield from (_python(value) for value in batch.column(0))


def _python(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return _Unreadable("invalid UTF-8", value.as_buffer().to_pybytes())


_READERS: dict[str, Callable[[str, str], Iterator[Any]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
