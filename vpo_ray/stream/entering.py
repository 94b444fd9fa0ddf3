"""Which rows enter a stream, and where: each behind the last table that has it.

What a table holds is compared on ids alone, and rows are read by the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from vpo_ray.records import Row
from vpo_ray.storage.id_sets import ID, id_set, isin_sorted, stored_ids, union
from vpo_ray.storage.tables import Table
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream.actor_pools import TASK_CPUS
from vpo_ray.stream.passes import Pass
from vpo_ray.stream.stops import stream_block

_GOOD = pc.field("error").is_null()


@dataclass(frozen=True)
class _Part:
    """How the parts of a table are read: its rows by a condition, expanded to the chain's, and of those
    the ones whose ids are in `ids`, or all others."""

    source: Table
    key: str
    schema: pa.Schema
    where: pc.Expression | None
    expand: Callable[[list[Row]], list[Row]]
    ids: Any  # a reference, stored once for all workers of a node
    only: bool


def entering(this: Pass) -> tuple[dict[str, Dataset], dict[str, int]]:
    """The rows that enter the stream at each stage; a stage that none enter at is absent. And how many rows
    each stage needs to see no more, as it, or a later one, has had them."""
    done = _later_ids(this)
    again = _render_again(this, done)
    if again is not None and "score" in this.stages:
        # They come to the score stage through the stream.
        done["score"] = union(done["score"], again)
    found = {name: _source(this, name, done[name], again) for name in this.stages}
    sources = {name: source for name, source in found.items() if source is not None}
    return sources, {name: len(ids) for name, ids in done.items()}


def expected(this: Pass) -> int:
    """How many rows every stage of a pass sees in the end, finished before or not."""
    chain, first = this.chain, this.stages[0]
    if this.render_ids is not None:
        return len(this.render_ids)
    if not chain.enters(first):
        return len(stored_ids(chain.table_before(this.run, first)))
    return len(stored_ids(this.run.table(chain.source), chain.queries)) * chain.rows_of_query(this.recipe)


def every_id(this: Pass, stage: str, where: pc.Expression | None = None) -> np.ndarray:
    """The ids of all rows that a stage has to see, finished or not."""
    chain = this.chain
    if not chain.enters(stage):
        return stored_ids(chain.table_before(this.run, stage), where)
    expand = chain.expand(this.recipe, this.models)
    queries = (batch.to_pylist() for batch in this.run.table(chain.source).batches(where=chain.queries))
    return id_set(row[chain.key] for batch in queries for row in expand(batch))


def _later_ids(this: Pass) -> dict[str, np.ndarray]:
    """For each stage, the ids that its own table or that of a later stage of the pass has already."""
    ids = id_set()
    later: dict[str, np.ndarray] = {}
    for stage in reversed(this.stages):
        # Mostly nothing is new: what left a later stage has passed this one.
        ids = union(ids, stored_ids(this.table(stage), _GOOD if this.retry_errors else None))
        later[stage] = ids
    return later


def _render_again(this: Pass, done: dict[str, np.ndarray]) -> np.ndarray | None:
    """Ids that the render stage takes though a table may have them; None where there are no such."""
    if this.render_ids is not None:
        # In a further pass those that were lost. What an earlier call left behind them is in both.
        lost = ~isin_sorted(this.render_ids, done["render"])
        return this.render_ids if this.is_first else this.render_ids[lost]
    if not this.retry_errors or "render" not in this.stages:
        return None
    again = _lost_videos(this)
    done["render"] = done["render"][~isin_sorted(done["render"], again)]
    return again


def _lost_videos(this: Pass) -> np.ndarray:
    """Rows that could not be scored because their video is damaged or gone: they are rendered again."""
    store, feedback = VideoStore(this.store), this.run.table("feedback")
    rows = feedback.rows(["candidate_id", "video_key", "error_stage"], ~_GOOD)
    unscored = [row for row in rows if row["error_stage"] == "score" and row["video_key"] is not None]
    good = feedback.keys(_GOOD) if unscored else set()
    return id_set(
        row["candidate_id"]
        for row in unscored
        if row["candidate_id"] not in good and not store.has(row["video_key"])
    )


def _source(this: Pass, stage: str, done: np.ndarray, again: np.ndarray | None) -> Dataset | None:
    chain = this.chain
    if stage == "render" and this.render_ids is not None:
        assert again is not None
        return _read(this, chain.table_before(this.run, stage), again, only=True) if len(again) else None
    where = _GOOD if this.retry_errors else None
    # Looked up only where something is done: a first run starts at once.
    if len(done) and isin_sorted(every_id(this, stage, where), done).all():
        return None
    if chain.enters(stage):
        expand = chain.expand(this.recipe, this.models)
        return _read(this, this.run.table(chain.source), done, chain.queries, expand)
    return _read(this, chain.table_before(this.run, stage), done, where)


def _as_they_are(rows: list[Row]) -> list[Row]:
    return rows


def _read(
    this: Pass,
    source: Table,
    ids: np.ndarray,
    where: pc.Expression | None = None,
    expand: Callable[[list[Row]], list[Row]] = _as_they_are,
    only: bool = False,
) -> Dataset | None:
    parts = source.parts()
    if not parts:
        return None
    how = _Part(source, this.chain.key, this.chain.schema, where, expand, ray.put(ids), only)
    dataset = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=min(len(parts), 1000)
    )
    return dataset.map_batches(
        partial(_read_parts, how=how), batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS
    )


def _read_parts(batch: pa.Table, how: _Part) -> Any:
    known = ray.get(how.ids)
    for part in batch["part"].to_pylist():
        for stored in how.source.batches(where=how.where, parts=[part]):
            rows = how.expand(stored.to_pylist())
            found = isin_sorted(np.array([row[how.key] for row in rows], ID), known)
            mine = [row for row, is_in in zip(rows, found, strict=True) if is_in == how.only]
            yield stream_block(mine, how.schema)
