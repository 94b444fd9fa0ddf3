"""Tables of Parquet parts, in a folder each (see `files.folder`).

A part is written atomically. Its name follows from the ids in it and from which of its rows failed or were
skipped, so that writing the same rows twice leaves one file, and a failure replaces no good row.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vpo_ray.files.folder import Folder, StorageError, beside, chunks
from vpo_ray.records import Row, Shard, content_id, table
from vpo_ray.storage import run_lock

if TYPE_CHECKING:
    from pyarrow.compute import Expression

logger = logging.getLogger(__name__)

# A folder of the run directory for facts about a table: the table's own folder has only Parquet parts, so
# that any reader of Parquet opens it.
META = "meta"
# In META/<table>, the names of a merged part's sources until they are deleted. Earlier versions wrote it
# next to the part.
_SOURCES = ".sources.json"
# Left by an earlier version that was killed while merging: names of parts that do not count.
_COMPACTING = "compacting.json"
_MERGED = re.compile(r"[0-9a-f]+-([0-9]+)\.parquet")  # a merged part has its number of rows in its name
# Columns that say why a row is incomplete, the worse the later.
_POOR = ("skipped", "error")
# Parts read at once, by threads; the footer of each, 200 kB, stays in memory meanwhile.
PARTS_AT_ONCE = 256


class Table(Folder):
    """A folder of Parquet parts with one schema and one key column.

    Args:
        also: columns that identify a row together with the key, where a key may have several rows.
        shard: read the rows of this shard only, and leave the merging of parts to the whole run's driver.
    """

    def __init__(
        self,
        uri: str | Path,
        schema: pa.Schema,
        key: str,
        also: Sequence[str] = (),
        shard: Shard | None = None,
    ) -> None:
        super().__init__(uri)
        self.schema, self.key, self.also, self.shard = schema, key, tuple(also), shard

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.uri, self.schema, self.key, self.also, self.shard))

    def _identities(self, rows: pa.Table | pa.RecordBatch) -> list[Any]:
        """The identity of each row: its key, or the tuple of the key and the `also` columns, "" for none."""
        keys: list[Any] = rows.column(self.key).to_pylist()
        if not self.also:
            return keys
        others = (rows.column(name).to_pylist() for name in self.also)
        return list(zip(keys, *([value or "" for value in values] for values in others), strict=True))

    def append(self, rows: Sequence[Row] | pa.Table) -> str:
        """Write rows as one part, and return its name ("" for no rows).

        The name is a function of the rows' keys and of which rows are poor (see `_ranks`), so no part of the
        same name has better rows.

        Raises:
            ValueError: a row does not fit the schema.
            StorageError: the part cannot be written.
        """
        if not len(rows):
            return ""
        whole = rows.cast(self.schema) if isinstance(rows, pa.Table) else table(list(rows), self.schema)
        keys = self._identities(whole)
        poor = sorted([key, int(rank)] for key, rank in zip(keys, self._ranks(whole), strict=True) if rank)
        name = f"{content_id(sorted(keys), *([poor] if poor else []))}.parquet"
        self._write_part(name, whole)
        return name

    def _write_part(self, name: str, rows: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        self.write(name, sink.getvalue().to_pybytes())

    def parts(self) -> list[str]:
        """Names of the parts of the table, without those whose rows are in a merged part."""
        files, hidden = self.files(), set[str]()
        while _merging(files):
            hidden = set().union(*(self._hidden_by(*mark, set(files)) for mark in self._marks(files)))
            # Files change while they are listed. A listing counts if no part was merged before its end.
            before, files = files, self.files()
            if _merging(files) == _merging(before) and set(before) <= set(files):
                files = before
                break
        return [name for name in files if is_part(name) and name not in hidden]

    def compact(self, fewest: int = 16, rows_per_part: int = 5000) -> int:
        """Merge the parts of single batches into larger ones. Returns the number of merged parts.

        A stage writes a part for every batch, so a table of renders may have one for each row. Readers see
        either the old parts or the merged one, even if this is killed: first a file with the names of the
        sources is written to META, and they do not count once the merged part is there. Then they are
        deleted; after a kill, `clear_merged` does so. A reader that listed the parts before may find one
        gone, which is a StorageError; reading again succeeds. A reader that does not use this class may see
        a row twice in the meantime.

        No row is lost if others write or merge at the same time: a part is deleted only while another one
        holds its rows, and a part that reappears under its name has no better ones (see `append`). A row may
        then be stored twice.

        Args:
            fewest: fewer single parts than this are not merged.
            rows_per_part: of a merged part.

        Raises:
            RunLostError: another driver has the run directory.
            StorageError: a part cannot be read, written or deleted; nothing is lost.
        """
        if self.shard is not None:
            return 0
        run_lock.check(self)
        self.clear_merged()
        parts = self.parts()
        merged_rows = {name: int(found[1]) for name in parts if (found := _MERGED.fullmatch(name))}
        small = [name for name in parts if merged_rows.get(name, 0) < rows_per_part]
        if sum(name not in merged_rows for name in small) < fewest:
            return 0
        merged: list[str] = []
        for group, rows in self._groups(small, rows_per_part):
            # Parts may have reappeared under the names of merged ones.
            names = (f"{content_id(group, again)}-{len(rows)}.parquet" for again in itertools.count())
            name = next(name for name in names if name not in parts and name not in merged)
            merged.append(name)
            self._meta().write_json(name + _SOURCES, group)
            self._write_part(name, rows)
        self.clear_merged()
        logger.debug("%s: %d parts are now %d", self.uri, len(small), len(merged))
        return len(small)

    def clear_merged(self) -> None:
        """Delete parts that do not count: those that a compaction, finished or killed, has merged.

        Raises:
            RunLostError: another driver has the run directory.
            StorageError: a part cannot be deleted.
        """
        files = set(self.files())
        marks = self._marks(files)
        if not marks or self.shard is not None:
            return
        run_lock.check(self)
        for folder, name in marks:
            for part in self._hidden_by(folder, name, files) & files:
                self.delete(part)
            folder.delete(name)

    def _meta(self) -> Folder:
        return Folder(beside(self.uri, META))

    def _marks(self, files: Iterable[str]) -> list[tuple[Folder, str]]:
        """The files that list parts which do not count, each with its folder."""
        meta = self._meta()
        return [(meta, name) for name in meta.files(_SOURCES)] + [(self, name) for name in _old_marks(files)]

    def _hidden_by(self, folder: Folder, name: str, files: Set[str]) -> set[str]:
        """The parts that do not count because of one of these files."""
        if name != _COMPACTING and name.removesuffix(_SOURCES) not in files:
            return set()  # the merged part does not exist yet, or any more
        try:
            return set(folder.read_json(name))
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError) as error:
            # Once it is deleted, rows may be stored twice, which `rows` handles.
            raise StorageError(f"{folder.at(name)} is damaged: delete it") from error
        except OSError as error:
            raise StorageError(f"cannot read {folder.at(name)}: {error}") from error

    def _groups(self, parts: Sequence[str], rows_per_part: int) -> Iterator[tuple[list[str], pa.Table]]:
        """The rows of parts in groups of about `rows_per_part`, each key once, with the parts they come
        from."""
        group: list[str] = []
        held: list[pa.RecordBatch] = []
        for some in chunks(parts, PARTS_AT_ONCE):
            group += some
            # A batch of one row takes as much memory as one of a hundred rows.
            held += pa.Table.from_batches(self.batches(parts=some), self.schema).combine_chunks().to_batches()
            if sum(batch.num_rows for batch in held) >= rows_per_part:
                yield group, self._each_key_once(held)
                group, held = [], []
        if group:
            yield group, self._each_key_once(held)

    def _each_key_once(self, batches: Iterable[pa.RecordBatch], columns: Sequence[str] = ()) -> pa.Table:
        """The batches (of some columns) as one table; of rows with one key, the first of the best."""
        schema = pa.schema([self.schema.field(name) for name in columns]) if columns else self.schema
        rows = pa.Table.from_batches(batches, schema)
        keys, ranks = self._identities(rows), self._ranks(rows)
        best: dict[Any, int] = {}
        for position, key in enumerate(keys):
            if key not in best or ranks[position] < ranks[best[key]]:
                best[key] = position
        return rows if len(best) == len(keys) else rows.take(list(best.values()))

    def _ranks(self, rows: pa.Table | pa.RecordBatch) -> np.ndarray:
        """How poor each row is: 0, 1 where it was skipped, 2 or more where it failed."""
        ranks = np.zeros(rows.num_rows, int)
        for rank, name in enumerate(_POOR, start=1):
            if name in rows.schema.names:
                ranks += rank * rows.column(name).is_valid().to_numpy(zero_copy_only=False)
        return ranks

    def replace(self, rows: Iterable[Row], rows_per_part: int = 1000) -> int:
        """Make the table hold exactly these rows. Returns their number. A kill leaves old and new parts
        together, which the next call repairs.

        Raises:
            RunLostError: another driver has the run directory.
        """
        run_lock.check(self)
        self.clear_merged()
        old, count = set(self.parts()), 0
        for chunk in chunks(rows, rows_per_part):
            old.discard(self.append(chunk))
            count += len(chunk)
        run_lock.check(self)
        for name in old:
            self.delete(name)
        return count

    def batches(
        self,
        columns: Sequence[str] | None = None,
        where: Expression | None = None,
        parts: Sequence[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stored batches of all parts (or of some). A key may occur twice (see `rows`).

        Raises:
            StorageError: a part is damaged or has another schema.
        """
        import pyarrow.dataset as pads  # it imports pandas

        required = {field.name for field in self.schema if not field.nullable}
        if self.shard is not None:
            where = self.shard.rows if where is None else self.shard.rows & where
        for some in chunks(self.parts() if parts is None else parts, PARTS_AT_ONCE):
            paths = [f"{self.path}/{part}" for part in some]
            try:
                dataset = pads.dataset(paths, schema=self.schema, filesystem=self.fs, format="parquet")
                for batch in dataset.to_batches(columns=list(columns) if columns else None, filter=where):
                    batch.validate(full=True)
                    # A column that a part lacks is read as nulls.
                    absent = [n for n in batch.schema.names if n in required and batch[n].null_count]
                    if absent:
                        lacks = f"no {', '.join(absent)}"
                        raise StorageError(f"{self.uri} holds a part of another table: {lacks}")
                    yield batch
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
                raise StorageError(f"{self.uri} holds a part that cannot be read: {error}") from error

    def rows(self, columns: Sequence[str] | None = None, where: Expression | None = None) -> Iterator[Row]:
        """Rows, each key once. If a key is stored twice (a retried error, a candidate that was skipped at
        first), the best row wins: a failed one only if there is no other."""
        wanted = list(columns) if columns else self.schema.names
        read = self._with_identity(wanted)
        poor: dict[Any, tuple[int, Row]] = {}
        seen: set[Any] = set()
        for batch in self.batches(read, where):
            ranks = self._ranks(batch).tolist()
            for key, rank, row in zip(self._identities(batch), ranks, batch.to_pylist(), strict=True):
                if key in seen:
                    continue
                if rank:
                    poor[key] = min(poor.get(key, (rank, row)), (rank, row), key=lambda known: known[0])
                    continue
                seen.add(key)
                yield {name: row[name] for name in wanted}
        for key, (_, row) in poor.items():
            if key not in seen:
                yield {name: row[name] for name in wanted}

    def _with_identity(self, columns: Sequence[str]) -> list[str]:
        """These columns, and those that rank rows of one key."""
        marks = [name for name in _POOR if name in self.schema.names]
        return list(dict.fromkeys([*columns, self.key, *self.also, *marks]))

    def arrow(self, columns: Sequence[str] | None = None, where: Expression | None = None) -> pa.Table:
        """The same rows as one Arrow table in memory."""
        wanted = list(columns) if columns else self.schema.names
        read = self._with_identity(wanted)
        return self._each_key_once(self.batches(read, where), read).select(wanted)

    def groups(self, by: str, columns: Sequence[str]) -> Iterator[list[Row]]:
        """The same rows, grouped by a column and in the order of its values. The table is read once, into
        Arrow memory, which takes a fifth of that of rows."""
        wanted = list(dict.fromkeys([by, *columns]))
        batches: list[pa.RecordBatch] = []
        best: dict[Any, tuple[int, str, int, int]] = {}
        for batch in self.batches(self._with_identity(wanted)):
            ranks, values = self._ranks(batch).tolist(), batch[by].to_pylist()
            for position, key in enumerate(self._identities(batch)):
                if key not in best or ranks[position] < best[key][0]:
                    best[key] = (ranks[position], values[position], len(batches), position)
            batches.append(batch.select(wanted))
        groups: dict[str, list[tuple[int, int]]] = {}
        for _, value, *place in best.values():
            groups.setdefault(value, []).append((place[0], place[1]))
        for value in sorted(groups):
            yield [batches[number].slice(row, 1).to_pylist()[0] for number, row in groups[value]]

    def keys(self, where: Expression | None = None) -> set[str]:
        return {key for batch in self.batches([self.key], where) for key in batch.column(0).to_pylist()}

    def count(self) -> int:
        """The number of rows, each identity once."""
        columns = [self.key, *self.also]
        return len({row for batch in self.batches(columns) for row in self._identities(batch)})


def is_part(name: str) -> bool:
    """Whether a file is a part; not one that starts with a dot, such as `._a.parquet`, which a copy by macOS
    leaves beside each."""
    return name.endswith(".parquet") and not name.startswith(".")


def _old_marks(files: Iterable[str]) -> list[str]:
    """Files of a table in which earlier versions listed parts that do not count."""
    return [name for name in files if name.endswith(_SOURCES) or name == _COMPACTING]


def _merging(files: Sequence[str]) -> list[str]:
    """Files of a table that merging makes."""
    return [*_old_marks(files), *(name for name in files if _MERGED.fullmatch(name))]
