"""Curate: raw user queries become `Query` rows, and every row that does not is counted with a reason.

Each file is read in batches (`read`), each batch gets its texts, flags, rules and hashes on its own
(`prepare_batch`, by this process or by Ray Data tasks: `workers`), and what needs all queries together is
done on arrays in one process: duplicates, near duplicates (`duplicates`), the diverse subset
(`diversity`), the splits (`split`). The result depends on content and on the order of the input,
never on how many workers there were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.recipe import Queries
from vpo_ray.records import DROPPED, QUERY, content_id
from vpo_ray.stages.curate import diversity, duplicates, rules
from vpo_ray.stages.curate.images import QueryImages
from vpo_ray.stages.curate.prepare import prepare_batch, wants_terms
from vpo_ray.stages.curate.read import EXCERPT, InputError, InputFile, query_files, read_batches
from vpo_ray.stages.curate.rules import KEPT, REASONS, RulesError, reason_code
from vpo_ray.stages.curate.split import split_of

__all__ = ["Curated", "InputError", "RulesError", "curate", "preview", "split_of", "wants_workers"]

# From so many bytes of input on, starting tasks costs less than they save.
_LARGE = 16 * 2**20


@dataclass(frozen=True)
class Curated:
    """All rows of the input in their order, and what became of each.

    `reasons` is int8 (n,), KEPT or a position in REASONS; `splits` holds the split of the kept rows,
    None for the others.
    """

    rows: pa.Table
    reasons: np.ndarray
    splits: np.ndarray
    files: Sequence[InputFile]

    def counts(self) -> Counter[str]:
        """Rows by split, and by reason of those that were dropped."""
        found = Counter(self.splits[self.reasons == KEPT].tolist())
        found.update(
            {REASONS[n]: int(count) for n, count in enumerate(np.bincount(self.reasons)) if n and count}
        )
        return found

    def queries(self, rows_per_part: int) -> Iterator[pa.Table]:
        """Tables of `records.QUERY`."""
        for part, rows in self._parts(self.reasons == KEPT, rows_per_part):
            columns = {
                "query_id": pa.array([key.hex() for key in part["key"].to_pylist()]),
                "query": part["text"],
                "image": part["image"],
                "source": pa.array(self._sources(part)),
                "split": pa.array(self.splits[rows]),
                "unsafe": part["unsafe"],
                "flags": part["flags"] if "flags" in part.column_names else pa.nulls(len(part)),
            }
            yield pa.table(columns).cast(QUERY)

    def dropped(self, rows_per_part: int) -> Iterator[pa.Table]:
        """Tables of `records.DROPPED`."""
        for part, rows in self._parts(self.reasons != KEPT, rows_per_part):
            sources, numbers = self._sources(part), part["row"].to_pylist()
            # Files in two folders may have one name: the position keeps their rows apart.
            ids = [content_id(*row) for row in zip(sources, numbers, part["file"].to_pylist(), strict=True)]
            columns = {
                "row_id": pa.array(ids),
                "source": pa.array(sources),
                "row": part["row"],
                "reason": pa.array([REASONS[reason] for reason in self.reasons[rows].tolist()]),
                "excerpt": pc.utf8_slice_codeunits(part["text"], 0, EXCERPT),
            }
            yield pa.table(columns).cast(DROPPED)

    def _parts(self, wanted: np.ndarray, size: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
        rows = np.flatnonzero(wanted)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield self.rows.take(part), part

    def _sources(self, part: pa.Table) -> list[str]:
        return [self.files[position].name for position in part["file"].to_pylist()]


def wants_workers(settings: Queries) -> bool:
    """Whether these queries are curated by Ray Data tasks, as `queries.workers` says."""
    if settings.workers is not None:
        return settings.workers > 0
    return sum(file.size() for file in query_files(settings)) >= _LARGE


def curate(settings: Queries, labels: Mapping[str, bool] | None = None, images: str | None = None) -> Curated:
    """Read, clean, de-duplicate, choose and split the queries. Ray must run if `wants_workers`.

    Args:
        labels: whether a query is unsafe, by query id; they count where the input has no label.
        images: URI of the store that images of queries go to. Without it they are not looked at, and a
            query's id counts its image's path.

    Raises:
        InputError: input that cannot be read, that holds no rows, or that cannot give `size` queries or
            the `unsafe_share` of them.
        RulesError: a rule that cannot be applied.
        StorageError: an image cannot be stored.
    """
    rules.check_rules(settings.rules)
    files = query_files(settings)
    takes = None if images is None else QueryImages(files, images)
    if wants_workers(settings):
        from vpo_ray.stages.curate.workers import prepare_on_ray

        batches = prepare_on_ray(files, settings, takes)
    else:
        raw = (batch for position in range(len(files)) for batch in read_batches(files, position, settings))
        batches = (prepare_batch(batch, settings, takes) for batch in raw)
    rows = _in_order([batch for batch in batches if batch.num_rows])
    if rows is None:
        raise InputError(f"queries.path {settings.path}: the input holds no rows")
    reasons = rows["reason"].to_numpy().copy()
    _drop_duplicates(rows, reasons)
    groups = _drop_near_duplicates(rows, reasons, settings)
    if settings.limit is not None:
        reasons[np.flatnonzero(reasons == KEPT)[settings.limit :]] = reason_code("over the limit")
    if labels is not None:
        rows = _labelled(rows, labels)
    if settings.size is not None:
        _choose(rows, reasons, settings)
    splits = np.full(len(reasons), None, object)
    for row in np.flatnonzero(reasons == KEPT).tolist():
        splits[row] = split_of(groups[row].hex(), settings.splits)
    listed = ("file", "row", "text", "image", "unsafe", "key", "flags")
    wanted = [name for name in listed if name in rows.column_names]
    return Curated(rows.select(wanted), reasons, splits, files)


def _in_order(batches: list[pa.Table]) -> pa.Table | None:
    """All rows by file and row; None if there are none."""
    if not batches:
        return None
    batches.sort(key=lambda batch: (batch["file"][0].as_py(), batch["row"][0].as_py()))
    rows = pa.concat_tables(batches)
    # Batches of many workers seldom overlap, and to reorder costs a copy of everything.
    order = np.lexsort((rows["row"], rows["file"]))
    return rows.combine_chunks() if (order[1:] > order[:-1]).all() else rows.take(order).combine_chunks()


def preview(settings: Queries) -> tuple[Counter[str], bool]:
    """What `Curated.counts` will say, without Ray, and whether it is exact.

    Of large input it is not: near duplicates, languages and the choice of a subset take too long for
    a plan; what they would drop counts as kept, up to `size`. Images are not looked at either.
    """
    if settings.unsafe_judge:
        # Which of them are unsafe is not known yet; how many are chosen is.
        settings = settings.model_copy(update={"unsafe_share": None})
    if sum(file.size() for file in query_files(settings)) < _LARGE:
        return curate(settings.model_copy(update={"workers": 0})).counts(), settings.image_column is None
    slow = {"near_duplicates": None, "size": None, "unsafe_share": None, "workers": 0}
    quick = settings.rules.model_copy(update={"languages": None})
    limit = settings.limit if settings.size is None else settings.size
    counts = curate(settings.model_copy(update={**slow, "rules": quick, "limit": limit})).counts()
    exact = settings.near_duplicates is None and settings.size is None and settings.rules.languages is None
    return counts, exact


def _fixed(rows: pa.Table, name: str, kept: np.ndarray, dtype: str) -> np.ndarray:
    """A binary column of the kept rows as an array (n, width / itemsize)."""
    column = rows[name].take(kept).combine_chunks()
    width = column.type.byte_width
    wide = (len(column), width // np.dtype(dtype).itemsize)
    if not len(column):
        return np.empty(wide, dtype)
    return np.frombuffer(column.buffers()[1], dtype, wide[0] * wide[1], column.offset * width).reshape(wide)


def _drop_duplicates(rows: pa.Table, reasons: np.ndarray) -> None:
    kept = np.flatnonzero(reasons == KEPT)
    first = duplicates.first_of_equal(_fixed(rows, "key", kept, "u8"))
    reasons[kept[~first]] = reason_code("duplicate")


def _by_content(rows: pa.Table, kept: np.ndarray) -> np.ndarray:
    """The kept rows in the order of their ids."""
    keys = _fixed(rows, "key", kept, ">u8")
    return kept[np.lexsort((keys[:, 1], keys[:, 0]))]


def _drop_near_duplicates(rows: pa.Table, reasons: np.ndarray, settings: Queries) -> Sequence[bytes]:
    """Drop them, and return for every row the first id of its group."""
    keys: list[bytes] = rows["key"].to_pylist()
    if settings.near_duplicates is None:
        return keys
    kept = _by_content(rows, np.flatnonzero(reasons == KEPT))
    again, group = duplicates.near_duplicates(
        _fixed(rows, "bands", kept, "u8"),
        _fixed(rows, "hashes", kept, "u1"),
        settings.near_duplicates.threshold,
    )
    if settings.near_duplicates.drop:
        reasons[kept[again]] = reason_code("near duplicate")
    for row, first in zip(kept.tolist(), kept[group].tolist(), strict=True):
        keys[row] = keys[first] if first != row else keys[row]
    return keys


def _labelled(rows: pa.Table, labels: Mapping[str, bool]) -> pa.Table:
    ids = pa.array([bytes.fromhex(query) for query in labels], rows["key"].type)
    positions = pc.index_in(rows["key"], value_set=ids)
    given = pa.array(list(labels.values()), pa.bool_()).take(positions.combine_chunks())
    return rows.set_column(
        rows.column_names.index("unsafe"), "unsafe", pc.coalesce(rows["unsafe"].combine_chunks(), given)
    )


def _choose(rows: pa.Table, reasons: np.ndarray, settings: Queries) -> None:
    """Keep a diverse subset of `size`, of which `unsafe_share` is unsafe where that is given."""
    assert settings.size is not None
    kept = _by_content(rows, np.flatnonzero(reasons == KEPT))
    if len(kept) < settings.size:
        raise InputError(
            f"queries.size: {settings.size:,} queries are asked for, but only {len(kept):,} of {len(rows):,} "
            f"rows are left after the rules ({_told(reasons)}); lower size, or give more queries"
        )
    groups = [(kept, settings.size)]
    if settings.unsafe_share is not None:
        unsafe = rows["unsafe"].take(kept).fill_null(False).to_numpy()
        number = round(settings.size * settings.unsafe_share)
        groups = [(kept[unsafe], number), (kept[~unsafe], settings.size - number)]
        for (found, wanted), kind in zip(groups, ("", "not "), strict=True):
            if len(found) < wanted:
                raise InputError(
                    f"queries.unsafe_share: {settings.unsafe_share:g} of {settings.size:,} queries takes "
                    f"{wanted:,} that are {kind}labelled unsafe (queries.unsafe_columns, unsafe_judge), but "
                    f"only {len(found):,} of the {len(kept):,} kept ones are; change the share, or lower size"
                )
    for found, wanted in groups:
        outside = np.ones(len(found), bool)
        outside[_diverse(rows, found, wanted, settings)] = False
        reasons[found[outside]] = reason_code("not in the subset")


def _diverse(rows: pa.Table, found: np.ndarray, size: int, settings: Queries) -> np.ndarray:
    if size == len(found) or not size:
        return np.arange(size)
    if wants_terms(settings):
        terms = rows["terms"].take(found).combine_chunks()
        # Their offsets are into all values, from the first row on.
        offsets = terms.offsets.to_numpy()
        vectors = diversity.embed(offsets - offsets[0], terms.values.to_numpy()[offsets[0] : offsets[-1]])
        return diversity.farthest_first(vectors, size)
    if len(found) > diversity.MAX_SELF_BLEU:
        raise InputError(
            f"queries.diversity.method self_bleu: {len(found):,} queries are more than the "
            f"{diversity.MAX_SELF_BLEU:,} it is meant for (about 1 GB and a minute for each 100,000); "
            "use farthest_first, or stricter rules"
        )
    return diversity.least_self_bleu(
        rows["text"].take(found).to_pylist(), size, settings.diversity.bleu_order
    )


def _told(reasons: np.ndarray) -> str:
    found = Counter(REASONS[reason] for reason in reasons.tolist() if reason != KEPT)
    return ", ".join(f"{count:,} {reason}" for reason, count in found.most_common()) or "none was dropped"
