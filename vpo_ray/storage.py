"""Files of a run: atomic writes, tables of Parquet parts, and the run directory.

Everything goes through `pyarrow.fs`, so a run directory is a local folder or an object store URI
(`s3://bucket/runs/a`, `gs://...`). A file appears whole or not at all: it is written aside and
renamed on a local disk, and object stores publish an object when its upload is complete. The name
of a part comes from the ids in it, so that writing the same rows twice leaves one file.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vpo_ray.records import DROPPED, FEEDBACK, PAIR, QUERY, SFT, Row, content_id, table

# Tables of a run directory: schema and key. The four stage tables share one schema; a candidate's
# row moves from `candidates` to `feedback` and gains columns on the way.
TABLES: dict[str, tuple[pa.Schema, str]] = {
    "queries": (QUERY, "query_id"),
    "dropped": (DROPPED, "row_id"),
    "sft": (SFT, "query_id"),
    "candidates": (FEEDBACK, "candidate_id"),
    "verdicts": (FEEDBACK, "candidate_id"),
    "renders": (FEEDBACK, "candidate_id"),
    "feedback": (FEEDBACK, "candidate_id"),
    "pairs": (PAIR, "pair_id"),
}


def chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class StorageError(RuntimeError):
    """A folder or object that cannot be read or written; the message says which and why."""

    stops_run = True  # see pools.STOP


class Folder:
    """A folder on any filesystem that `pyarrow.fs` opens. Picklable; cheap to make.

    Args:
        uri: a local path or a URI.

    Raises:
        StorageError: a URI of no known filesystem, or a bucket that cannot be found.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        self.uri = text.rstrip("/") if "://" in text else str(Path(text).resolve())
        self._open()

    def _open(self) -> None:
        try:
            self.fs, self.path = pafs.FileSystem.from_uri(
                self.uri if "://" in self.uri else Path(self.uri).as_uri()
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"cannot open {self.uri}: {error}") from error

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return (type(self), (self.uri,))

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def write(self, name: str, data: bytes) -> None:
        """Write one file whole or not at all. Raises StorageError (read-only, full, no access)."""
        target = f"{self.path}/{name}"
        aside = f"{target}.{uuid.uuid4().hex}.tmp" if self.is_local else target
        try:
            self.fs.create_dir(os.path.dirname(target), recursive=True)
            with self.fs.open_output_stream(aside) as stream:
                stream.write(data)
            if aside != target:
                self.fs.move(aside, target)
        except OSError as error:
            if aside != target and os.path.exists(aside):
                os.unlink(aside)
            raise StorageError(f"cannot write {self.uri}/{name}: {error}") from error

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when there is no such file."""
        with self.fs.open_input_stream(f"{self.path}/{name}") as stream:
            return stream.read()

    def exists(self, name: str) -> bool:
        return self.fs.get_file_info(f"{self.path}/{name}").type == pafs.FileType.File

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def files(self, suffix: str = "") -> list[str]:
        """Sorted names (relative, recursive) of the files here; none when the folder is absent.

        Raises:
            StorageError: the folder cannot be listed.
        """
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        try:
            infos = self.fs.get_file_info(selector)
        except OSError as error:
            raise StorageError(f"cannot list {self.uri}: {error}") from error
        base = len(self.path) + 1
        return sorted(
            i.path[base:] for i in infos if i.type == pafs.FileType.File and i.path.endswith(suffix)
        )


class Table(Folder):
    """A folder of Parquet parts with one schema and one key column."""

    def __init__(self, uri: str | Path, schema: pa.Schema, key: str) -> None:
        super().__init__(uri)
        self.schema, self.key = schema, key

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.uri, self.schema, self.key))

    def append(self, rows: Sequence[Row]) -> str:
        """Write rows as one part named by their keys, and return its name ("" for no rows).

        Raises:
            ValueError: a row does not fit the schema.
            StorageError: the part cannot be written.
        """
        if not rows:
            return ""
        sink = pa.BufferOutputStream()
        pq.write_table(table(list(rows), self.schema), sink, compression="zstd")
        name = f"{content_id(sorted(row[self.key] for row in rows))}.parquet"
        self.write(name, sink.getvalue().to_pybytes())
        return name

    def parts(self) -> list[str]:
        return self.files(".parquet")

    def replace(self, rows: Iterable[Row], rows_per_part: int = 1000) -> int:
        """Make the table hold exactly these rows; returns how many. A kill in between leaves old
        and new parts together, which the next call mends."""
        old, count = set(self.parts()), 0
        for chunk in chunks(rows, rows_per_part):
            old.discard(self.append(chunk))
            count += len(chunk)
        for name in old:
            self.fs.delete_file(f"{self.path}/{name}")
        return count

    def batches(
        self,
        columns: Sequence[str] | None = None,
        where: pads.Expression | None = None,
        parts: Sequence[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stored batches of all parts (or of some). A key may occur twice (see `rows`).

        Raises:
            StorageError: a part is damaged or has another schema.
        """
        paths = [f"{self.path}/{part}" for part in (self.parts() if parts is None else parts)]
        if not paths:
            return
        required = {field.name for field in self.schema if not field.nullable}
        try:
            dataset = pads.dataset(paths, schema=self.schema, filesystem=self.fs, format="parquet")
            for batch in dataset.to_batches(columns=list(columns) if columns else None, filter=where):
                batch.validate(full=True)
                # A column that a part lacks comes as nulls.
                absent = [n for n in batch.schema.names if n in required and batch[n].null_count]
                if absent:
                    raise StorageError(f"{self.uri} holds a part of another table: no {', '.join(absent)}")
                yield batch
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
            raise StorageError(f"{self.uri} holds a part that cannot be read: {error}") from error

    def rows(
        self, columns: Sequence[str] | None = None, where: pads.Expression | None = None
    ) -> Iterator[Row]:
        """Rows, each key once. Where a key is stored twice (a retried error), a row without an
        error wins over one with."""
        wanted = list(columns) if columns else self.schema.names
        has_error = "error" in self.schema.names
        read = list(dict.fromkeys([*wanted, self.key, *(["error"] if has_error else [])]))
        bad: dict[str, Row] = {}
        seen: set[str] = set()
        for batch in self.batches(read, where):
            for row in batch.to_pylist():
                key = row[self.key]
                if key in seen:
                    continue
                if has_error and row["error"] is not None:
                    bad.setdefault(key, row)
                    continue
                seen.add(key)
                yield {name: row[name] for name in wanted}
        for key, row in bad.items():
            if key not in seen:
                yield {name: row[name] for name in wanted}

    def keys(self, where: pads.Expression | None = None) -> set[str]:
        return {key for batch in self.batches([self.key], where) for key in batch.column(0).to_pylist()}

    def count(self) -> int:
        return len(self.keys())


class RunDir(Folder):
    """One run: `recipe.yaml`, `versions.json`, the tables, `videos/`, `checkpoints/`, `metrics/`,
    `report/` and `ledger.json`."""

    def table(self, name: str) -> Table:
        schema, key = TABLES[name]
        return Table(f"{self.uri}/{name}", schema, key)

    def write_metrics(self, phase: str, lines: Sequence[Row]) -> None:
        """Store a training curve: `metrics/<phase>.jsonl`, one JSON object a step."""
        self.write(f"metrics/{phase}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def metrics(self, phase: str) -> list[Row]:
        if not self.exists(f"metrics/{phase}.jsonl"):
            return []
        return [json.loads(line) for line in self.read(f"metrics/{phase}.jsonl").splitlines()]
