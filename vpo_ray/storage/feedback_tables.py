"""What an endpoint keeps where its recipe says so: its answers, and what users said of them.

Both are tables in one folder or object store, to which replicas append. The images of queries are beside
them, by content, where the recipe has them kept. `forget` takes out rows, and images that no row keeps any
more. It leaves a mark in `forgotten/`, so that a replica drops what it has not appended yet.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.files.folder import Folder, StorageError, join
from vpo_ray.records import Row, content_id
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.tables import Table, is_part

logger = logging.getLogger(__name__)

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
        pa.field("image_name", pa.string()),  # of it in `images/`, null where it is not kept
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

# Images that are written at once, bytes that `forget` holds of those it has deleted, and how often it looks
# again at a table that changes meanwhile.
_WRITERS, _HELD_BYTES, _READS = 8, 256 * 2**20, 3

# Replicas write a part every few seconds. So many that are smaller than this are made into larger ones.
_FEWEST, _SMALL_BYTES, _MERGED_ROWS = 16, 256 * 2**10, 5000

Goes = Callable[[Row], bool]
T = TypeVar("T")


class Mark(NamedTuple):
    """When `forget` was called and, where it was for older rows, for what is older than which time."""

    time: float
    before: float | None = None


class Forgotten(NamedTuple):
    """How many rows of both tables are gone, and how many images."""

    rows: int
    images: int


@dataclass(frozen=True)
class FeedbackTables:
    """The two tables of a store, and its images."""

    uri: str

    @property
    def answers(self) -> Table:
        return Table(join(self.uri, "answers"), ANSWER, "answer_id")

    @property
    def opinions(self) -> Table:
        return Table(join(self.uri, "opinions"), OPINION, "opinion_id")

    @property
    def images(self) -> ImageStore:
        return ImageStore(join(self.uri, "images"))

    def append(self, table: Table, rows: Sequence[Row], images: Mapping[str, bytes] | None = None) -> None:
        """Append rows to one of the two tables, but those that `forget` was asked for after they were made,
        also where it is asked meanwhile.

        Args:
            images: that rows keep, by name. Only those of rows that are appended are stored.

        Raises:
            StorageError: the store cannot be read or written.
        """
        goes = _marked(self._marks())
        kept = [row for row in rows if not goes(row)]
        parts = [table.append(kept)] if kept else []
        self._store(_images_of(kept), images or {})
        # An earlier call may have appended the others, and failed afterwards.
        self._take_back(table, table.parts() if len(kept) < len(rows) else parts, rows)

    def _take_back(self, table: Table, parts: Sequence[str], rows: Sequence[Row]) -> None:
        """Take rows that `forget` was asked for out of parts of a table again. It writes its mark before it
        looks for rows: one whose mark is not seen here finds what is written here."""
        marks = self._marks()
        while any(map(goes := _marked(marks), rows)):
            _without(table, goes, parts)
            if names := _images_of(row for row in rows if goes(row)):
                self._drop_images(names)
            seen, marks = marks, self._marks()
            if marks == seen:
                return

    def _store(self, names: set[str], images: Mapping[str, bytes]) -> None:
        """Store images, once the rows that keep them are there (see `_drop_images`)."""
        store = self.images
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(lambda name: store.keep(name, images[name]), sorted(names & images.keys())))

    def _drop_images(self, among: Collection[str] | None = None) -> int:
        """Delete images that no row keeps (all that is in their folder, or some); returns how many are gone.

        A replica appends its row first, and looks for the image then. Where it finds one that is deleted here
        afterwards, its row is seen here, and the image is put back.
        """
        folder, gone = self.images.folder, 0
        loose = sorted(set(folder.files() if among is None else among) - self._kept_images())
        while loose:
            held: dict[str, bytes] = {}
            while loose and sum(map(len, held.values())) < _HELD_BYTES:
                name = loose.pop()
                with suppress(FileNotFoundError):  # another took it
                    held[name] = _read(folder, name)
                    folder.delete(name)
            for name in held.keys() & self._kept_images():
                folder.write(name, held.pop(name))
            gone += len(held)
        return gone

    def _kept_images(self) -> set[str]:
        """Names of the images that rows keep."""
        named = pc.field("image_name").is_valid()
        found = _read_whole(lambda: list(self.answers.batches(["image_name"], named)))
        return {name for batch in found for name in batch.column(0).to_pylist()}

    def rows(self) -> tuple[list[Row], list[Row]]:
        """The rows of both tables, each key once, also while parts are merged. Raises StorageError."""
        return _read_whole(lambda: list(self.answers.rows())), _read_whole(lambda: list(self.opinions.rows()))

    def forget(
        self, key: str | None = None, answer_id: str | None = None, before: float | None = None
    ) -> Forgotten:
        """Take out the rows of a key, of an answer, or that are older than a time (seconds since 1970), and
        every image that no row keeps then.

        What replicas still hold of it is not appended any more; what comes of the key or the answer from
        `SKEW_S` seconds after the call on is kept. Killed on its way, it has deleted a part of the rows; the
        same call deletes the rest. An image that a row keeps may be gone then, too. One
        that a replica which is killed while it writes leaves without a row goes with the next call. Versions
        of files that an object store keeps are its owner's to expire.

        Raises:
            StorageError: the store cannot be read or written.
        """

        def goes(row: Row) -> bool:
            return (
                (key is not None and row["key"] == key)
                or (answer_id is not None and row["answer_id"] == answer_id)
                or (before is not None and row["time"] < before)
            )

        now = time.time()
        for name, mark in self._marks().items():
            if mark.time < now - MARK_S:
                self._forgotten.delete(f"{name}.json")
        for column, value in (("key", key), ("answer_id", answer_id), ("before", before)):
            if value is not None:
                content = {"time": now, **({"before": before} if column == "before" else {})}
                self._forgotten.write_json(f"{_mark(column, value)}.json", content)
        out: Goes = goes
        marks, rows = self._marks(), 0
        while True:
            rows += sum(_without(table, out, table.parts()) for table in (self.answers, self.opinions))
            seen, marks = marks, self._marks()
            if marks == seen:
                return Forgotten(rows, self._drop_images())
            # Of another call meanwhile, which may have taken its rows out of parts that were replaced here.
            out = _either(goes, _marked(marks))

    def merge(self) -> None:
        """Make large parts of small ones, where the store can be written. Replicas may append meanwhile, and
        others forget or merge; killed on its way, it leaves rows that are stored twice."""
        for table in (self.answers, self.opinions):
            try:
                self._merge(table)
            except StorageError as error:  # or another replaced a part, and the next call merges them
                logger.info("small parts stay: %s", error)

    def _merge(self, table: Table) -> None:
        sizes = {name: info.size for info in table.infos() if is_part(name := info.base_name)}
        small = [name for name, size in sorted(sizes.items()) if size < _SMALL_BYTES]
        if len(small) < _FEWEST:
            return
        held: list[Row] = []
        sources: list[str] = []
        for part in small:
            held += [row for batch in table.batches(parts=[part]) for row in batch.to_pylist()]
            sources.append(part)
            if len(held) >= _MERGED_ROWS or part == small[-1]:
                # A row that is stored twice is equal in both; answers of one id may differ in their time.
                rows = list({(row[table.key], row["time"]): row for row in held}.values())
                merged = table.append(rows)
                for name in sources:
                    if name != merged:
                        table.delete(name)
                self._take_back(table, [merged], rows)
                held, sources = [], []

    @property
    def _forgotten(self) -> Folder:
        return Folder(join(self.uri, "forgotten"))

    def _marks(self) -> dict[str, Mark]:
        """The marks, by their names."""
        marks = {}
        for file in self._forgotten.files(".json"):
            try:
                content = self._forgotten.read_json(file)
                before = content.get("before")
                made = Mark(float(content["time"]), None if before is None else float(before))
                marks[file.removesuffix(".json")] = made
            except FileNotFoundError:
                continue  # deleted since it was listed
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise StorageError(
                    f"{self._forgotten.at(file)} is no mark of `vpo forget` that can be read: {error}"
                ) from error
        return marks


def _read_whole(read: Callable[[], T]) -> T:
    """What is read of a table, read again where a part was replaced meanwhile. Raises StorageError."""
    for _ in range(_READS):
        with suppress(StorageError):
            return read()
    return read()


def _images_of(rows: Iterable[Row]) -> set[str]:
    """Names of the images that rows keep."""
    return {name for row in rows if (name := row.get("image_name")) is not None}


def _read(folder: Folder, name: str) -> bytes:
    """A file's bytes, whatever they are. Raises FileNotFoundError and StorageError."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {folder.at(name)}: {error}") from error


def _mark(column: str, value: str | float) -> str:
    """The name of a mark, which does not tell whose rows are gone."""
    return content_id("forgotten", column, value)


def _marked(marks: Mapping[str, Mark]) -> Goes:
    oldest = max((mark.before for mark in marks.values() if mark.before is not None), default=-math.inf)

    def goes(row: Row) -> bool:
        named = (marks.get(_mark(column, row[column])) for column in ("key", "answer_id"))
        return row["time"] < oldest or any(mark and row["time"] < mark.time + SKEW_S for mark in named)

    return goes


def _either(one: Goes, other: Goes) -> Goes:
    return lambda row: one(row) or other(row)


def _without(table: Table, goes: Goes, parts: Sequence[str], tries: int = _READS) -> int:
    """Take rows out of parts of a table; returns how many. Where another replaced a part meanwhile, all
    parts are looked at."""
    gone, replaced = 0, False
    for part in parts:
        try:
            rows = [row for batch in table.batches(parts=[part]) for row in batch.to_pylist()]
        except StorageError:
            if not tries or table.exists(part):
                raise
            replaced = True
            continue
        kept = [row for row in rows if not goes(row)]
        if len(kept) == len(rows):
            continue
        # A part's name follows from its rows, so that the shorter one is another file.
        table.append(kept)
        table.delete(part)
        gone += len(rows) - len(kept)
    return gone + (_without(table, goes, table.parts(), tries - 1) if replaced else 0)
