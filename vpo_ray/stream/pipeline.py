"""The streaming part of the loop: a chain of stages (see `stages.spec`) as one Ray Data execution.

All pools work at the same time. Every stage stores its rows in its own table as they leave it; a row
enters the stream behind the last table that has it, so a run that was killed, or whose stages were run
one by one, goes on exactly where it stopped.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.data import Dataset

from vpo_ray.recipe import Recipe
from vpo_ray.records import Row, failed
from vpo_ray.stages import spec
from vpo_ray.stages.chains import Models
from vpo_ray.stages.made_with import refuse_other_inputs
from vpo_ray.storage.id_sets import isin_sorted, stored_ids, union
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.actor_pools import Outcome, progress_handle, split_blocks
from vpo_ray.stream.adaptive_rounds import AdaptiveRounds
from vpo_ray.stream.entering import entering, every_id, expected
from vpo_ray.stream.last_words import with_causes
from vpo_ray.stream.meter import Meter
from vpo_ray.stream.passes import Pass
from vpo_ray.stream.placement import cluster_state, pool_shapes, problems, require, watched
from vpo_ray.stream.previews import PreviewError, Previews
from vpo_ray.stream.progress import spilled_so_far
from vpo_ray.stream.ray_compat import spare_driver
from vpo_ray.stream.spending import endpoint_cost
from vpo_ray.stream.stage_pools import add_pool
from vpo_ray.stream.status import Status
from vpo_ray.stream.stops import first_stop

__all__ = ["GenerationError", "Models", "generate"]

logger = logging.getLogger(__name__)

# Replicas of a stage that may die in a row while they load, before the run gives up.
INIT_DEATHS = 2

Counts = dict[str, dict[str, float]]


class GenerationError(RuntimeError):
    """A run that was stopped; the message says why. What was made is kept."""


class StoppedError(GenerationError):
    """A row came out that stops the run. `node`: the id of a node whose disk is full, where that is why."""

    def __init__(self, reason: str, node: str | None) -> None:
        super().__init__(f"{reason}\nFix this and run the same command again: what was made is kept")
        self.reason, self.node = reason, node


def generate(
    recipe: Recipe,
    run: RunDir,
    models: Models,
    stages: Sequence[str] | None = None,
    retry_errors: bool = False,
    stop: threading.Event | None = None,
) -> Counts:
    """Run consecutive stages as one stream until every row has passed the last of them.

    Rows that are missing afterwards, because a process died under them, are taken again in blocks
    of one; after `limits.tries` passes they become error rows. A pass in which a node was lost says
    nothing of its rows and is not counted; nor is one that met a full disk on a node, whose rows go to
    the other nodes.

    Args:
        stages: names; those from queries to feedback when unset.
        stop: ends the call with a StoppedError when the next row comes out.

    Returns:
        Counts by stage of what this call did, and the seconds that its replicas took to warm up.

    Raises:
        PlacementError: no node can take a replica of a pool.
        GenerationError: too large a share of rows failed, a model cannot be used, or a table or the
            video store cannot be written.
        StorageError: a table cannot be merged into fewer parts.
        OtherInputsError: see `made_with.refuse_other_inputs`.
    """
    whole = Pass(recipe, run, models, tuple(stages or spec.names("generation")), retry_errors)
    for stage in whole.stages:
        whole.table(stage).clear_merged()
    spilled = spilled_so_far()
    call = _Call(whole.stages, stop)
    if "render" in whole.stages and (recipe.render.strategy == "adaptive" or recipe.render.preview):
        # What is rendered depends on all texts of a query, and then on the scores of its videos.
        at = whole.stages.index("render")
        texts, videos = (replace(whole, stages=part) for part in (whole.stages[:at], whole.stages[at:]))
        if recipe.render.preview and "score" not in videos.stages:
            raise GenerationError(
                "with render.preview, scores of previews decide what is rendered: run `vpo generate`, which "
                "renders and scores"
            )
        if texts.stages:
            call.finish(texts)
        if recipe.render.preview:
            _finish_previews(call, videos, stop)
        else:
            rounds = AdaptiveRounds(recipe, run, videos.stages, retry_errors)
            while (render_ids := rounds.next()) is not None:
                call.finish(replace(videos, retry_errors=False, render_ids=render_ids))
    else:
        call.finish(whole)
    if spilled := spilled_so_far() - spilled:
        logger.warning("the object store spilled %.2f GB to disk: see docs/operations.md", spilled / 1e9)
    return call.counts


def _finish_previews(call: _Call, videos: Pass, stop: threading.Event | None) -> None:
    """Go through the passes of previews, counted as `preview`, and of the full renders that they choose."""
    looks = _Call(videos.stages, stop)
    try:
        for each in Previews(videos).passes():
            (looks if each.run.uri != videos.run.uri else call).finish(each)
    except PreviewError as error:
        raise GenerationError(str(error)) from None
    call.counts["preview"] = looks.counts["render"]


@dataclass(frozen=True)
class _Stream:
    """A pass as a dataset. `stages` are those that have a pool in it."""

    dataset: Dataset
    progress: Any
    stages: tuple[str, ...]
    meter: Meter

    def look(self) -> Row:
        """The view of now (see `meter`)."""
        counts, paid = self.progress.snapshot.remote(), self.progress.paid.remote()
        return self.meter.view(time.monotonic(), *ray.get([counts, paid], timeout=5))


class _Call:
    """One call of `generate`: its counts, and the stages whose inputs were compared with those that their
    rows were made with."""

    def __init__(self, stages: Sequence[str], stop: threading.Event | None) -> None:
        self._stop = stop
        self.counts: Counts = {
            stage: {"done": 0, "errors": 0, "passed": 0, "warm_up_s": 0} for stage in stages
        }
        self._compared: set[str] = set()

    def finish(self, first: Pass) -> None:
        """Go through the stages with all rows, in as many passes as it takes, and merge their tables."""
        this, missing, tries = first, sys.maxsize, 0
        while (stream := _stream(this)) is not None:
            nodes, before = _nodes(), missing
            full = self._run(this, stream)
            missing = _missing(this)
            if not missing:
                break
            gone = len(nodes - _nodes())
            this = replace(this, is_first=False, retry_errors=False)
            if full is not None:
                if missing >= before:
                    raise full  # nothing was done without the node before: what is full is no node's own
                this = replace(this, retry_errors=first.retry_errors)
                this = _without_node(this, stream.stages, full)
                logger.warning("%s: %d rows are taken on the other nodes", full.reason, missing)
            elif gone and missing < before:
                logger.warning("%d rows were lost as %d node(s) went, and are taken again", missing, gone)
            else:
                tries += 1
                lost = f"{missing} rows were lost with a process that died (pass {tries})"
                logger.warning("%s", with_causes(lost, this.run, "MapBatches("))
                if tries == this.recipe.limits.tries:
                    _give_up(this)
                    break
                this = replace(this, one_row_blocks=True)
        for stage in first.stages:
            first.table(stage).compact()

    def _run(self, this: Pass, stream: _Stream) -> StoppedError | None:
        """Run a stream to its end, or to a node whose disk is full: returned is the error that says so."""
        refuse_other_inputs(this.recipe, this.run, [s for s in stream.stages if s not in self._compared])
        self._compared.update(stream.stages)
        shapes = pool_shapes(this.recipe, stream.stages, this.excluded)
        patience, full = this.recipe.limits.placement_timeout_s, None
        require(shapes, patience)
        try:
            with watched(shapes, patience):
                _drain(stream, this, self._stop)
        except StoppedError as error:
            if error.node is None:
                raise
            full = error
        for stage, counts in ray.get(stream.progress.snapshot.remote()).items():
            total = self.counts[stage]
            total.update({name: round(total[name] + counts[name], 1) for name in total})
            if counts["warm_up_s"]:
                logger.debug(
                    "%s: %.1f s to load and warm up, apart from its rows", stage, counts["warm_up_s"]
                )
        return full


def _stream(this: Pass) -> _Stream | None:
    """The dataset of all rows that some stage of the pass still has to see, or None without such rows."""
    sources, before = entering(this)
    if not sources:
        return None
    root, place = this.run.root()
    spent = endpoint_cost(this.run) if this.recipe.limits.max_cost is not None else 0.0
    progress = progress_handle(this.stages, spent, (root.uri, place))
    stream: Dataset | None = None
    busy: list[str] = []
    for stage in this.stages:
        rows, source = this.block_rows(stage), sources.get(stage)
        if stream is not None and rows != this.block_rows(busy[-1]):
            stream = split_blocks(stream, rows)
        if source is not None:
            source = split_blocks(source, rows)
            stream = source if stream is None else stream.union(source)
        if stream is not None:
            last = stage == this.stages[-1]
            outcome = Outcome(stage, this.table(stage), progress, last=last, spent=spent)
            stream = add_pool(stream, spec.stage(stage), this, outcome)
            busy.append(stage)
    assert stream is not None
    if this.render_ids is not None:
        before = {}
    return _Stream(stream, progress, tuple(busy), Meter(_title(this), before, expected(this)))


def _title(this: Pass) -> str:
    """What a user calls the pass."""
    name = this.stages[0] if len(this.stages) == 1 else "generate"
    name = "previews" if this.run.root()[1].rpartition("/")[0].endswith("preview") else name
    return f"{name}, shard {this.run.shard}" if this.run.shard else name


def _drain(stream: _Stream, this: Pass, ended: threading.Event | None) -> None:
    """Run the stream to its end; the driver sees ids and errors only."""
    limits = this.recipe.limits
    finished = errors = 0
    _configure(stream.dataset)
    with Status(this.run, stream.look), _explained(this.run):
        for batch in stream.dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            finished += batch.num_rows
            errors += batch.num_rows - batch["error"].null_count
            if (stop := first_stop(batch)) is not None:
                raise StoppedError(stop["reason"], stop["node"])
            if ended is not None and ended.is_set():
                raise StoppedError("the work beside it has ended", None)
            if finished >= limits.min_rows and errors > limits.max_error_share * finished:
                reasons = batch["error"].drop_null().unique().to_pylist()[:3]
                raise GenerationError(
                    f"{errors} of {finished} rows failed, over limits.max_error_share "
                    f"{limits.max_error_share}. The last reasons: {reasons}. "
                    "Fix the cause and run again with --retry-errors"
                )


@contextmanager
def _explained(run: RunDir) -> Iterator[None]:
    """Ray's error for a replica that cannot start is a page of traces; its last line is the cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        found = re.search(r"MapBatches\(\w+\)", str(error))
        message = with_causes(
            f"a replica failed to start or work: {cause}", run, found[0] if found else "MapBatches("
        )
        raise GenerationError(
            f"{message}\n`vpo logs {run.uri}` shows what dead replicas said last, `vpo -v` the output of all"
        ) from error


def _configure(dataset: Dataset) -> None:
    context = dataset.context
    # A block that is lost with its process is taken again in the next pass, alone.
    context.max_errored_blocks = -1
    # A replica that is lost while it loads is started again; one that cannot load fails each time.
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    # One block may hold a render of half an hour; `render.time_limit_s` ends a hung one.
    context.execution_no_progress_timeout_s = 24 * 3600
    spare_driver(context)


def _nodes() -> set[str]:
    """The ids of the nodes that are up."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _without_node(this: Pass, stages: Sequence[str], full: StoppedError) -> Pass:
    """The pass, with the pools of these stages kept off one more node. Raises what it is given where no
    other node can take them."""
    excluded = (*this.excluded, str(full.node))
    if problems(pool_shapes(this.recipe, stages, excluded), cluster_state()):
        raise full
    return replace(this, excluded=excluded)


def _missing(this: Pass) -> int:
    """How many rows have not come out behind the last stage."""
    if this.render_ids is None:
        wanted = every_id(this, this.stages[0])
    else:
        wanted = union(this.render_ids, stored_ids(this.table("render")))
    return int(np.count_nonzero(~isin_sorted(wanted, stored_ids(this.table(this.stages[-1])))))


def _give_up(this: Pass) -> None:
    """Turn rows that no pass could finish into error rows of the stage that they died in."""
    reason = f"the process died under this row in each of {this.recipe.limits.tries} passes"
    chain = this.chain
    for position, stage in enumerate(this.stages):
        tables = [this.table(name) for name in this.stages[position:]]
        have = set().union(*(target.keys() for target in tables))
        rows: Iterable[Row] = chain.rows_before(this.recipe, this.run, this.models, stage)
        if stage == "render" and this.render_ids is not None:
            taken = {candidate.decode() for candidate in this.render_ids.tolist()}
            rows = (row for row in rows if row["candidate_id"] in taken)
        dead = [failed(row, stage, reason) for row in rows if row[chain.key] not in have]
        for target in tables:
            target.append(dead)
