"""Rows of users' input files: text, JSONL, JSON, CSV, TSV, Parquet and Arrow.

Queries, SFT data and examples are read here. A reader yields the values of each row, or why it is unreadable,
so that a bad row costs only itself. It holds a batch of rows at a time (JSON: the file).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vpo_ray.files.input_files import READ_ERRORS, InputError, InputFile, why_unreadable
from vpo_ray.files.text_files import encoding_of

INVALID = "invalid UTF-8"


@dataclass(frozen=True)
class Unreadable:
    """An unreadable row: a reason of `stages.curate.rules`, and its bytes."""

    reason: str
    raw: bytes = b""


# Yields a tuple of the columns' values, a JSON value that is not an object, or an `Unreadable`.
Reader = Callable[[BinaryIO, Sequence[str]], Iterator[Any]]


def records(file: InputFile, columns: Sequence[str], key: str, kind: str | None = None) -> Iterator[Any]:
    """The rows of a file.

    Args:
        columns: wanted columns, the required one first: a JSON object without it is unreadable, others
            may be absent. Tables must have all of them.
        key: the recipe's key of the file, for messages.
        kind: one of READERS, in place of the file's ending.

    Yields:
        A tuple of the columns' values; a line of text or a JSON value other than an object, as it is; or
        an `Unreadable`.

    Raises:
        InputError: the file cannot be read, or lacks a column or has it twice.
    """
    name = file.kind if kind is None else kind
    try:
        with file.open() as stream:
            # Decompressed streams cannot be read from the end.
            whole = file.packing and name in (".parquet", ".arrow")
            yield from READERS[name](io.BytesIO(stream.read()) if whole else stream, columns)
    except (*READ_ERRORS, pa.ArrowException, csv.Error) as error:
        raise InputError(f"{key} {file}: {why_unreadable(error)}") from error


def json_line(value: Any) -> str:
    """A value as a line of JSONL, with its end. Characters that some readers take for line ends are
    escaped."""
    text = json.dumps(value, ensure_ascii=False)
    for character in "\x85\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


# Text


class _Utf8(io.RawIOBase):
    """A stream of another encoding as UTF-8. What cannot be decoded becomes a replacement character."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._rest = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            raw = self._stream.read(65536)
            self._rest = self._decoder.decode(raw, final=not raw).encode("utf-8")
            if not raw:
                break
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


class _Joined(io.RawIOBase):
    """Bytes that were read already, followed by the rest of their stream."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self._head[: len(buffer)] if self._head else self._stream.read(len(buffer))
        self._head = self._head[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _utf8(stream: BinaryIO) -> io.BufferedReader:
    """The stream as UTF-8 without a byte order mark."""
    head = stream.read(4)
    mark, encoding = encoding_of(head)
    body: io.RawIOBase = _Joined(head[len(mark) :], stream)
    if encoding != "utf-8":
        body = _Utf8(cast(BinaryIO, body), encoding)
    return io.BufferedReader(body, 1 << 18)


def _lines(stream: BinaryIO) -> Iterator[str | Unreadable]:
    for line in _utf8(stream):
        raw = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(codecs.BOM_UTF8)
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            yield Unreadable(INVALID, raw)


def _text(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    return _lines(stream)


def _fields(value: Any, columns: Sequence[str]) -> Any:
    """A record's values: the value itself, or its columns; without the first it is unreadable."""
    if not isinstance(value, dict):
        return value
    if isinstance(value, _Twice) and not value.names.isdisjoint(columns):
        return Unreadable("not JSON", json.dumps(value).encode())
    if columns[0] not in value:
        return Unreadable("no such column", json.dumps(value).encode())
    return tuple(value.get(column) for column in columns)


def _jsonl(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    for line in _lines(stream):
        if isinstance(line, Unreadable):
            yield line
        elif line.strip():
            try:
                twice = any(line.count(f'"{column}"') > 1 for column in columns)
                value = json.loads(line, object_pairs_hook=_mapping if twice else None)
            except (ValueError, RecursionError):
                yield Unreadable("not JSON", line.encode())
            else:
                yield _fields(value, columns)


class _Twice(dict[str, Any]):
    """An object with duplicate names, of which a parser would take the last value."""

    names: set[str]


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        made = _Twice(made)
        made.names = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return made


def _json(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    raw = stream.read()
    try:
        # Bytes that are not text become lone surrogates, which `normalise` refuses row by row.
        values = json.loads(
            raw.decode(json.detect_encoding(raw), "surrogateescape"), object_pairs_hook=_mapping
        )
    except (ValueError, RecursionError) as error:
        mark, encoding = encoding_of(raw)
        if raw[len(mark) :].decode(encoding, "ignore").lstrip().startswith("{"):
            # Many JSONL files are called .json.
            yield from _jsonl(io.BytesIO(raw), columns)
            return
        raise InputError(f"not a JSON file: {error}") from error
    if isinstance(values, dict) and columns[0] in values:
        values = [values]
    if not isinstance(values, list):
        raise InputError(f"expected a JSON list of strings or objects, found {type(values).__name__}")
    yield from (_fields(value, columns) for value in values)


# Tables


def _csv(stream: BinaryIO, columns: Sequence[str], delimiter: str = ",") -> Iterator[Any]:
    # Bytes that are not UTF-8 become lone surrogates, as in `_json`.
    lines = _CsvLines(io.TextIOWrapper(_utf8(stream), "utf-8", "surrogateescape", newline=""))
    rows = csv.reader(lines, delimiter=delimiter)
    header = next(rows, [])
    positions = _positions(columns, header)
    while True:
        again = lines.begin()
        try:
            row = next(rows, None)
            whole = not lines.cut
        except csv.Error:
            row, whole = [], False
        if row is None:
            return
        if not whole or (again and row and len(row) != len(header)):
            yield Unreadable("not CSV", lines.give_back())
        elif row:
            yield tuple(row[position] if position < len(row) else None for position in positions)


class _CsvLines:
    """The lines of a CSV file. A quotation mark that nothing closes takes all lines behind it into its row,
    so those of a row that cannot be read are given back: the first alone is lost."""

    def __init__(self, text: Iterable[str]) -> None:
        self._text, self._again = iter(text), deque[str]()
        self._row: list[str] = []
        self.cut = False  # the file ends within a row of several lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._text, None)
        if line is None:
            self.cut = len(self._row) > 1
            raise StopIteration
        self._row.append(line)
        return line

    def begin(self) -> bool:
        """A row begins; whether its first line was given back."""
        self._row, self.cut = [], False
        return bool(self._again)

    def give_back(self) -> bytes:
        """Give back the lines of this row but the first, which is returned."""
        first, *others = self._row
        self._again.extendleft(reversed(others))
        return first.encode("utf-8", "surrogateescape")


def _tsv(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    return _csv(stream, columns, "\t")


def _parquet(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise InputError(f"not a Parquet file: {error}") from error
    _positions(columns, file.schema_arrow.names)
    for batch in file.iter_batches(columns=list(columns)):
        yield from _columns(batch, columns)


def _arrow(stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    """Arrow IPC, the stream that `datasets` saves or a file."""
    magic = stream.read(6)
    stream.seek(0)
    batches: Iterable[pa.RecordBatch]
    try:
        if magic == b"ARROW1":
            file = pa.ipc.open_file(stream)
            names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(stream)
            names = reader.schema.names
    except pa.ArrowInvalid as error:
        raise InputError(f"not an Arrow file: {error}") from error
    _positions(columns, names)
    for batch in batches:
        yield from _columns(batch, columns)


def _positions(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Positions of the columns. Raises InputError for one that is absent or ambiguous."""
    for column in columns:
        if column not in names:
            raise InputError(f"no column {column!r}; it has {list(names)}")
        if names.count(column) > 1:
            raise InputError(f"column {column!r} is there {names.count(column)} times: rename all but one")
    return [names.index(column) for column in columns]


def _columns(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[Any]:
    yield from zip(*(_python(batch.column(column)) for column in columns), strict=True)


def _python(array: pa.Array) -> list[Any]:
    """Values of a column. Bytes are read as UTF-8, since many writers of Parquet do not mark strings."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_fixed_size_binary(kind):
        array = array.cast(pa.binary())
    try:
        if pa.types.is_binary(array.type) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            return array.cast(pa.large_string()).to_pylist()
        return array.to_pylist()
    except (ValueError, OverflowError):
        return [_scalar(value) for value in array]


def _scalar(value: pa.Scalar) -> Any:
    try:
        found = value.as_py()
        return found.decode("utf-8") if isinstance(found, bytes) else found
    except UnicodeDecodeError:
        raw = value.as_buffer() if hasattr(value, "as_buffer") else None  # a list has none
        return Unreadable(INVALID, raw.to_pybytes() if raw is not None else b"")
    except (ValueError, OverflowError):  # a time that Python has no value for
        return Unreadable("not text")


# Readers by the ending of a file's name.
READERS: dict[str, Reader] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
