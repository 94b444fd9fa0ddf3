"""Read raw queries: files of every kind, anywhere, as batches of rows; one bad row costs itself only.

A path is a file, a glob or a folder (a Hugging Face dataset saved to disk, or as the hub has it),
on a local disk, on a store that `pyarrow.fs` opens (`s3://`, `gs://`), or on any other that fsspec
knows.
"""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vpo_ray.recipe import Queries
from vpo_ray.records import normalise
from vpo_ray.stages.curate.rules import KEPT, code, visible

RAW = pa.schema(
    [
        pa.field("file", pa.int32()),  # position in the list of files
        pa.field("row", pa.int64()),  # from 1
        pa.field("text", pa.large_string()),  # the normalised query; of a dropped row, an excerpt
        pa.field("reason", pa.int8()),  # why it is dropped: a position in rules.REASONS
        pa.field("unsafe", pa.bool_()),  # null: not labelled
    ]
)
ROWS_PER_BATCH, CHARS_PER_BATCH = 5_000, 4_000_000
EXCERPT = 200
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_TRUE, _FALSE = {"true", "yes", "unsafe"}, {"false", "no", "safe"}


class InputError(ValueError):
    """Input that cannot be read, or does not hold what is asked of it; the message says what to do."""


@dataclass(frozen=True)
class InputFile:
    """A file: its path, and the URI that its filesystem is opened from (None for a local one)."""

    path: str
    root: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def kind(self) -> str:
        return PurePosixPath(self.path).suffix.lower()

    def open(self) -> BinaryIO:
        return open(self.path, "rb") if self.root is None else _filesystem(self.root)[0].open(self.path, "rb")

    def size(self) -> int:
        """Bytes; 0 where that is not known."""
        try:
            fs = None if self.root is None else _filesystem(self.root)[0]
            return Path(self.path).stat().st_size if fs is None else fs.size(self.path) or 0
        except OSError:
            return 0


def find_files(settings: Queries) -> list[InputFile]:
    """The files that `queries.path` names, in its order, those of a glob or folder by name.

    Raises:
        InputError: nothing there, a filesystem that cannot be opened, or a kind that is not known.
    """
    patterns = [settings.path] if isinstance(settings.path, str) else settings.path
    files: list[InputFile] = []
    for pattern in patterns:
        if "://" in pattern and urlsplit(pattern).password is not None:
            raise InputError(
                "queries.path: a URI must not hold a password: give credentials by the environment"
            )
        try:
            found = _remote(pattern) if "://" in pattern else _local(pattern)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"queries.path {pattern}: {_reason(error)}") from error
        if not found:
            raise InputError(f"queries.path {pattern}: no file matches")
        files += found
    for file in files:
        if file.kind not in _READERS:
            raise InputError(
                f"queries.path {file.path}: unknown kind; use one of {', '.join(_READERS)}, "
                "or a folder of them"
            )
        if file.kind == ".txt" and settings.unsafe_columns:
            raise InputError(
                f"queries.path {file.path}: a text file has no columns, see queries.unsafe_columns"
            )
    return files


def read_batches(files: Sequence[InputFile], position: int, settings: Queries) -> Iterator[pa.Table]:
    """The rows of one file as tables of RAW.

    Raises:
        InputError: the file cannot be read, or it has no such column.
    """
    file = files[position]
    columns = [settings.column, *settings.unsafe_columns]
    rows: list[tuple[Any, ...]] = []
    chars = 0
    try:
        with file.open() as stream:
            for number, values in enumerate(_READERS[file.kind](stream, columns), start=1):
                row = (position, number, *_accept(values, settings))
                rows.append(row)
                chars += len(row[2] or "")
                if len(rows) == ROWS_PER_BATCH or chars > CHARS_PER_BATCH:
                    yield _table(rows)
                    rows, chars = [], 0
    except (OSError, pa.ArrowException, csv.Error, _FileError) as error:
        raise InputError(f"queries.path {file.path}: {_reason(error)}") from error
    if rows:
        yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW
    )


class _FileError(Exception):
    """What is wrong with a file as a whole."""


class _Unreadable:
    """A row that could not be decoded, kept so that it is counted."""

    def __init__(self, reason: str, raw: bytes) -> None:
        self.reason, self.raw = reason, raw


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    if isinstance(error, _FileError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it cannot be read: {error}"


# From a row to its text, or the reason to drop it


def _accept(values: Any, settings: Queries) -> tuple[str | None, int, bool | None]:
    """Text (of a dropped row, an excerpt), reason and label of one row."""
    value, *labels = values if isinstance(values, tuple) else (values,)
    text, reason = _text_of(value, settings)
    unsafe = None
    if reason == KEPT:
        try:
            unsafe = _label(labels, settings.unsafe_threshold)
        except ValueError:
            reason = code("bad unsafe label")
    return (text if reason == KEPT else _excerpt(value)), reason, unsafe


def _text_of(value: Any, settings: Queries) -> tuple[str, int]:
    if value is None:
        return "", code("null")
    if isinstance(value, _Unreadable):
        return "", code(value.reason)
    if not isinstance(value, str):
        return "", code("not text")
    try:
        text = normalise(value)
    except UnicodeEncodeError:
        return "", code("invalid UTF-8")
    if "\x00" in text:
        return "", code("binary")
    if not visible(text):
        return "", code("empty")
    if len(text) > settings.max_chars:
        return "", code("too long")
    if len(text) < settings.min_chars:
        return "", code("too short")
    return text, KEPT


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
        if isinstance(value, _Unreadable)
        else str(value)[:EXCERPT].encode("utf-8", "replace")
    )
    return raw.decode("utf-8", "replace")


# Where files are


def _local(pattern: str) -> list[InputFile]:
    if Path(pattern).is_dir():
        paths = _data_files(pattern, [str(path) for path in Path(pattern).rglob("*") if path.is_file()])
        return [InputFile(path) for path in paths]
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [InputFile(pattern)]
    found = (file for path in sorted(glob.glob(pattern, recursive=True)) for file in _local(path))
    return list(dict.fromkeys(found))  # `**` names a folder and what is in it


def _remote(uri: str) -> list[InputFile]:
    location, question, options = uri.partition("?")
    parts = location.split("/")
    first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), None)
    root = "/".join(parts[:first]) + question + options
    fs, path = _filesystem(root)
    if first is not None:
        found = fs.glob("/".join([path.rstrip("/"), *parts[first:]]), detail=True)
        names = sorted(name for name, info in found.items() if info["type"] == "file")
    # A web server has no folders; to ask for one would fetch the file.
    elif not location.startswith("http") and fs.isdir(path):
        names = _data_files(path, fs.find(path))
    else:
        names = [path]
    return [InputFile(name, root) for name in names]


def _data_files(folder: str, paths: Iterable[str]) -> list[str]:
    """The data of a folder: without metadata, hidden files and caches; columnar files if it has any."""
    data = []
    for path in sorted(paths):
        relative = PurePosixPath(path[len(folder) :].lstrip("/"))
        hidden = any(part.startswith((".", "_")) for part in relative.parts)
        cache = relative.suffix == ".arrow" and relative.name.startswith("cache-")
        if (
            not hidden
            and not cache
            and relative.name not in _METADATA
            and relative.suffix.lower() in _READERS
        ):
            data.append(path)
    columnar = [path for path in data if path.lower().endswith((".parquet", ".arrow"))]
    return columnar or data


@functools.lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[Any, str]:
    """An fsspec filesystem and the path in it. pyarrow's own filesystems come first."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return fsspec.core.url_to_fs(uri)
    return ArrowFSWrapper(fs), path


# Kinds of files: every reader yields a row's values (query, then labels), or what could not be read


def _lines(stream: BinaryIO) -> Iterator[str | _Unreadable]:
    for line in stream:
        raw = line.rstrip(b"\r\n")
        try:
            yield raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield _Unreadable("invalid UTF-8", raw)


def _text(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    return _lines(stream)


def _fields(value: Any, columns: list[str]) -> Any:
    """A record's values: the value itself, or its columns; a record without the query is counted."""
    if not isinstance(value, dict):
        return value if not isinstance(value, tuple) else (value,)
    if columns[0] not in value:
        return _Unreadable("no such column", json.dumps(value).encode())
    return tuple(value.get(column) for column in columns)


def _jsonl(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    for line in _lines(stream):
        if isinstance(line, _Unreadable):
            yield line
        elif line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield _Unreadable("not JSON", line.encode())
            else:
                yield _fields(value, columns)


def _json(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    raw = stream.read()
    try:
        # Bytes that are no text come as lone surrogates, which `normalise` refuses row by row.
        values = json.loads(raw.decode(json.detect_encoding(raw), "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise _FileError(f"not a JSON file: {error}") from error
    if not isinstance(values, list):
        raise _FileError(f"expected a JSON list of strings or objects, found {type(values).__name__}")
    yield from (_fields(value, columns) for value in values)


def _csv(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    # Bytes that are no UTF-8 come as lone surrogates, as in `_json`.
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""))
    _need(columns, list(reader.fieldnames or []))
    while True:
        try:
            record = next(reader, None)
        except csv.Error:
            yield _Unreadable("not CSV", b"")
            continue
        if record is None:
            return
        yield tuple(record[column] for column in columns)


def _parquet(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise _FileError(f"not a Parquet file: {error}") from error
    _need(columns, file.schema_arrow.names)
    for batch in file.iter_batches(columns=columns):
        yield from _columns(batch, columns)


def _arrow(stream: BinaryIO, columns: list[str]) -> Iterator[Any]:
    """Arrow IPC, the stream that `datasets` saves or a file."""
    magic = stream.read(6)
    stream.seek(0)
    try:
        if magic == b"ARROW1":
            file = pa.ipc.open_file(stream)
            names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(stream)
            names = batches.schema.names
    except pa.ArrowInvalid as error:
        raise _FileError(f"not an Arrow file: {error}") from error
    _need(columns, names)
    for batch in batches:
        yield from _columns(batch, columns)


def _need(columns: list[str], names: list[str]) -> None:
    for column in columns:
        if column not in names:
            raise _FileError(f"no column {column!r}; it has {names}")


def _columns(batch: pa.RecordBatch, columns: list[str]) -> Iterator[Any]:
    yield from zip(*(_python(batch.column(column)) for column in columns), strict=True)


def _python(array: pa.Array) -> list[Any]:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_scalar(value) for value in array]


def _scalar(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return _Unreadable("invalid UTF-8", value.as_buffer().to_pybytes())


_READERS: dict[str, Callable[[BinaryIO, list[str]], Iterator[Any]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
