"""What an endpoint keeps where its recipe says so: its answers, and what users said of them.

Both are tables in one folder or object store, to which replicas append. `forget` takes rows out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from vpo_ray.files.folder import join
from vpo_ray.records import Row
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

    def forget(
        self, key: str | None = None, answer_id: str | None = None, before: float | None = None
    ) -> int:
        """Take out the rows of a key, of an answer, or that are older than a time (seconds since 1970).

        Rows that are appended meanwhile stay. Killed on its way, it has deleted a part of them; the same call
        deletes the rest. Versions of files that an object store keeps are its owner's to expire.

        Returns:
            How many rows are gone, of both tables.
        """

        def goes(row: Row) -> bool:
            return (
                (key is not None and row["key"] == key)
                or (answer_id is not None and row["answer_id"] == answer_id)
                or (before is not None and row["time"] < before)
            )

        return _without(self.answers, goes) + _without(self.opinions, goes)


def _without(table: Table, goes: Callable[[Row], bool]) -> int:
    gone = 0
    for part in table.parts():
        rows = [row for batch in table.batches(parts=[part]) for row in batch.to_pylist()]
        kept = [row for row in rows if not goes(row)]
        if len(kept) == len(rows):
            continue
        # A part's name follows from its rows, so that the shorter one is another file.
        table.append(kept)
        table.delete(part)
        gone += len(rows) - len(kept)
    return gone
