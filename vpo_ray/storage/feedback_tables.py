"""What an endpoint keeps where its recipe says so: its answers, and what users said of them.

Both are tables in one folder or object store, to which replicas append. `forget` takes rows out again, and
leaves a mark in `forgotten/`, so that a replica drops what it has not appended yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from vpo_ray.files.folder import Folder, StorageError, join
from vpo_ray.records import Row, content_id
from vpo_ray.storage.tables import Table

# One row an answer of each key: equal answers to one query have one id.
ANSWER = pa.schema(
    [
        pa.field("answer_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # the API key's name
        pa.field("time", pa.float64(), nullable=False),  # seconds since 1970, of the first such answer
        pa.field("checkpoint", pa.string()),
        pa.field("query_hash", pa.string(), nullable=False),
        pa.field("query", pa.string()),  # null where only hashes are kept
        pa.field("image", pa.string()),  # the hash of the query's image
        pa.field("conditions", pa.string()),  # of the request's wishes, see `prompts.conditions`
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("alternatives", pa.list_(pa.string()), nullable=False),
        pa.field("safety", pa.string(), nullable=False),  # pass | rewritten | refused
    ]
)

# One row for each thing that was said. `chosen`: 0 is the answer's prompt, 1 its first alternative.
OPINION = pa.schema(
    [
        pa.field("opinion_id", pa.string(), nullable=False),
        pa.field("answer_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("rating", pa.string()),  # up | down
        pa.field("chosen", pa.int32()),
        pa.field("edited", pa.string()),
        pa.field("comment", pa.string()),
    ]
)

# Seconds by which clocks of replicas may be ahead of the clock of `forget`, and for which a mark is kept:
# longer than a replica holds rows while its store fails.
SKEW_S, MARK_S = 10.0, 30 * 86400.0

Goes = Callable[[Row], bool]


@dataclass(frozen=True)
class FeedbackTables:
    """The two tables of a store."""

    uri: str

    @property
    def answers(self) -> Table:
        return Table(join(self.uri, "answers"), ANSWER, "answer_id")

    @property
    def opinions(self) -> Table:
        return Table(join(self.uri, "opinions"), OPINION, "opinion_id")

    def append(self, table: Table, rows: Sequence[Row]) -> None:
        """Append rows to one of the two tables, but those that `forget` was asked for after they were made,
        also where it is asked meanwhile.

        Raises:
            StorageError: the store cannot be read or written.
        """
        goes = _marked(self._marks())
        rows = [row for row in rows if not goes(row)]
        if not rows:
            return
        part = table.append(rows)
        # A mark is written before rows are looked for: one that is not seen here finds this part.
        goes = _marked(self._marks())
        if any(map(goes, rows)):
            _without(table, goes, [part])

    def forget(
        self, key: str | None = None, answer_id: str | None = None, before: float | None = None
    ) -> int:
        """Take out the rows of a key, of an answer, or that are older than a time (seconds since 1970).

        What replicas still hold of the key or the answer is not appended any more; what comes from
        `SKEW_S` seconds after the call on is kept. Killed on its way, it has deleted a part of the rows; the
        same call deletes the rest. Versions of files that an object store keeps are its owner's to expire.

        Returns:
            How many rows are gone, of both tables.
        """

        def goes(row: Row) -> bool:
            return (
                (key is not None and row["key"] == key)
                or (answer_id is not None and row["answer_id"] == answer_id)
                or (before is not None and row["time"] < before)
            )

        now = time.time()
        for name, made in self._marks().items():
            if made < now - MARK_S:
                self._forgotten.delete(f"{name}.json")
        for column, value in (("key", key), ("answer_id", answer_id)):
            if value is not None:
                self._forgotten.write_json(f"{_mark(column, value)}.json", {"time": now})
        return sum(_without(table, goes, table.parts()) for table in (self.answers, self.opinions))

    @property
    def _forgotten(self) -> Folder:
        return Folder(join(self.uri, "forgotten"))

    def _marks(self) -> dict[str, float]:
        """When each mark was made, by its name."""
        marks = {}
        for file in self._forgotten.files(".json"):
            try:
                marks[file.removesuffix(".json")] = float(self._forgotten.read_json(file)["time"])
            except FileNotFoundError:
                continue  # deleted since it was listed
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise StorageError(
                    f"{self._forgotten.at(file)} is no mark of `vpo forget` that can be read: {error}"
                ) from error
        return marks


def _mark(column: str, value: str) -> str:
    """The name of a mark, which does not tell whose rows are gone."""
    return content_id("forgotten", column, value)


def _marked(marks: Mapping[str, float]) -> Goes:
    def goes(row: Row) -> bool:
        names = (_mark(column, row[column]) for column in ("key", "answer_id"))
        return any(row["time"] < marks.get(name, float("-inf")) + SKEW_S for name in names)

    return goes


def _without(table: Table, goes: Goes, parts: Sequence[str]) -> int:
    """Take rows out of parts of a table; returns how many."""
    gone = 0
    for part in parts:
        rows = [row for batch in table.batches(parts=[part]) for row in batch.to_pylist()]
        kept = [row for row in rows if not goes(row)]
        if len(kept) == len(rows):
            continue
        # A part's name follows from its rows, so that the shorter one is another file.
        table.append(kept)
        table.delete(part)
        gone += len(rows) - len(kept)
    return gone
