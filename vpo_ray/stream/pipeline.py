"""The streaming part of the loop: a chain of stages as one Ray Data execution.

    queries ─► sample ─► judge ─► render ─► score ─► feedback
    queries ─► draft ─► drafts
    unlabelled ─► label ─► labels

All pools work at the same time. Every stage stores its rows in its own table as they leave
it; a row enters the stream behind the last table that has it, so a run that was killed, or whose
stages were run one by one, goes on exactly where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from vpo_ray.recipe import Recipe
from vpo_ray.records import Row, failed
from vpo_ray.storage.id_sets import ID, among, id_set, stored_ids, union
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream.actor_pools import TASK_CPUS, Outcome, progress_handle, split_blocks
from vpo_ray.stream.adaptive_rounds import Rounds
from vpo_ray.stream.chains import CHAIN_OF, GENERATION, Chain, Models
from vpo_ray.stream.made_with import refuse_other_inputs
from vpo_ray.stream.placement import look, pool_shapes, problems, require, watched
from vpo_ray.stream.progress import StatusTable, spilled_bytes
from vpo_ray.stream.ray_compat import spare_driver
from vpo_ray.stream.spending import paid
from vpo_ray.stream.stage_pools import POOLS, block_rows
from vpo_ray.stream.stops import first_stop, stream_block

__all__ = ["STAGES", "GenerationError", "Models", "generate"]

logger = logging.getLogger(__name__)

STAGES = GENERATION.stages

# Replicas of a stage that may die in a row while they load, before the run gives up.
INIT_DEATHS = 2

# Ray's own label of each node.
NODE_LABEL = "ray.io/node-id"


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
    stages: Sequence[str] = tuple(STAGES),
    retry_errors: bool = False,
) -> dict[str, dict[str, float]]:
    """Run consecutive stages as one stream until every row has passed the last of them.

    Rows that are missing afterwards, because a process died under them, are taken again in blocks
    of one; after `limits.tries` passes they become error rows. A pass in which a node was lost says
    nothing of its rows and is not counted; nor is one that met a full disk on a node, whose rows go to
    the other nodes.

    Returns:
        Counts by stage of what this call did, and the seconds that its replicas took to warm up.

    Raises:
        PlacementError: no node can take a replica of a pool.
        GenerationError: too large a share of rows failed, a model cannot be used, or a table or the
            video store cannot be written.
        StorageError: a table cannot be merged into fewer parts.
        OtherInputsError: see `made_with.refuse_other_inputs`.
    """
    total: dict[str, dict[str, float]] = {
        stage: {"done": 0, "errors": 0, "passed": 0, "warm_up_s": 0} for stage in stages
    }
    for stage in stages:
        CHAIN_OF[stage].table(run, stage).clear_merged()
    spilled = spilled_bytes()
    known: set[str] = set()
    if recipe.render.strategy == "adaptive" and "render" in stages:
        # What is rendered depends on all texts of a query, and then on the scores of its videos.
        at = list(stages).index("render")
        texts, videos = stages[:at], stages[at:]
        if texts:
            _generate(recipe, run, models, texts, retry_errors, total, known)
        rounds = Rounds(recipe, run, videos, retry_errors)
        while (enter := rounds.next()) is not None:
            _generate(recipe, run, models, videos, False, total, known, enter)
    else:
        _generate(recipe, run, models, stages, retry_errors, total, known)
    if spilled := spilled_bytes() - spilled:
        logger.warning("the object store spilled %.2f GB to disk: see docs/operations.md", spilled / 1e9)
    return total


def _generate(
    recipe: Recipe,
    run: RunDir,
    models: Models,
    stages: Sequence[str],
    retry_errors: bool,
    total: dict[str, dict[str, float]],
    known: set[str],
    enter: np.ndarray | None = None,
) -> None:
    """One stream with its further passes for lost rows; adds to the counts of `total`.

    Args:
        known: stages whose inputs are those that their rows were made with; more are added.
        enter: the ids that the render stage takes, and no others of those that wait for it.
    """
    tries, first, missing = 0, True, sys.maxsize
    full: StoppedError | None = None
    while tries < recipe.limits.tries:
        # Only a row that is alone in its process can be told to have killed it.
        alone = tries > 0
        retry = retry_errors and (first or full is not None)
        stream = _stream(recipe, run, models, stages, retry, first, alone, enter)
        if stream is None:
            break
        nodes, before, first, full = _nodes(), missing, False, None
        dataset, progress, busy = stream
        refuse_other_inputs(recipe, run, [stage for stage in busy if stage not in known])
        known.update(busy)
        shapes, patience = pool_shapes(recipe, busy), recipe.limits.placement_timeout_s
        require(shapes, patience)
        try:
            with watched(shapes, patience):
                _drain(dataset, progress, recipe)
        except StoppedError as error:
            if error.node is None:
                raise
            full = error
        for stage, counts in ray.get(progress.snapshot.remote()).items():
            for name in total[stage]:
                total[stage][name] = round(total[stage][name] + counts[name], 1)
            if counts["warm_up_s"]:
                logger.info("%s: %.1f s to load and warm up, apart from its rows", stage, counts["warm_up_s"])
        missing = _unfinished(recipe, run, models, stages, enter)
        if not missing:
            break
        gone = len(nodes - _nodes())
        if full is not None:
            if missing >= before:
                raise full  # nothing was done without the node before: what is full is no node's own
            recipe = _elsewhere(recipe, busy, full)
            logger.warning("%s: %d rows are taken on the other nodes", full.reason, missing)
        elif gone and missing < before:
            logger.warning("%d rows were lost as %d node(s) went, and are taken again", missing, gone)
        else:
            tries += 1
            logger.warning("%d rows were lost with a process that died (pass %d)", missing, tries)
    else:
        _give_up(recipe, run, models, stages, enter)
    for stage in stages:
        CHAIN_OF[stage].table(run, stage).compact()


def _elsewhere(recipe: Recipe, stages: Sequence[str], full: StoppedError) -> Recipe:
    """The recipe with the pools of these stages kept off one more node. Raises what it is given where no
    other node could take them."""
    for shape in pool_shapes(recipe, stages):
        before = shape.labels.get(NODE_LABEL, "!in()")
        if shape.count > 1 or not before.startswith("!in("):
            continue  # Ray places the pieces of one engine without labels
        ids = [*filter(None, before[4:-1].split(",")), str(full.node)]
        labels = {**shape.labels, NODE_LABEL: f"!in({','.join(ids)})"}
        recipe = _labelled(recipe, shape.where.split("."), labels)
    if problems(pool_shapes(recipe, stages), look()):
        raise full
    return recipe


def _labelled(section: Any, path: Sequence[str], labels: dict[str, str]) -> Any:
    """A section with the labels at the end of a path of keys."""
    name, *rest = path
    inner = getattr(section, name)
    inner = _labelled(inner, rest, labels) if rest else inner.model_copy(update={"labels": labels})
    return section.model_copy(update={name: inner})


def _stream(
    recipe: Recipe,
    run: RunDir,
    models: Models,
    stages: Sequence[str],
    retry_errors: bool,
    first: bool,
    alone: bool,
    enter: np.ndarray | None,
) -> tuple[Dataset, Any, list[str]] | None:
    """The dataset of all rows that some of `stages` still have to see, its progress and the stages that
    have a pool in it, or None if there are no such rows."""
    chain = CHAIN_OF[stages[0]]
    root, place = run.root()
    spent = paid(run) if recipe.limits.max_cost is not None else 0.0
    progress = progress_handle(stages, spent, (root.uri, place))
    done = _later_keys(run, stages, retry_errors)
    again = _lost_videos(recipe, run) if retry_errors and "render" in stages else id_set()
    if enter is not None:
        # In a second pass, those that were lost; what an earlier call left behind them is in both.
        again = enter if first else enter[~among(enter, done["render"])]
    elif len(again):
        done["render"] = done["render"][~among(done["render"], again)]
    if "score" in stages:
        done["score"] = union(done["score"], again)
    stream: Dataset | None = None
    busy: list[str] = []
    flowing = 0
    for stage in stages:
        if stage == "render" and enter is not None:
            source = _read(chain.table_before(run, stage), chain, again, _rows_as_they_are, None, chosen=True)
        else:
            source = _entering(recipe, run, models, stage, done[stage], retry_errors)
        rows = 1 if alone else block_rows(recipe, stage)
        if stream is not None and rows != flowing:
            stream = split_blocks(stream, rows)
        if source is not None:
            source = split_blocks(source, rows)
            stream = source if stream is None else stream.union(source)
        if stream is not None:
            flowing = rows
            outcome = Outcome(stage, chain.table(run, stage), progress, last=stage == stages[-1], spent=spent)
            stream = POOLS[stage](stream, recipe, run, models, outcome, rows, alone)
            busy.append(stage)
    return None if stream is None else (stream, progress, busy)


def _later_keys(run: RunDir, stages: Sequence[str], retry_errors: bool) -> dict[str, np.ndarray]:
    """For each stage, the ids that its own table or one behind it has already."""
    where = pc.field("error").is_null() if retry_errors else None
    keys = id_set()
    later: dict[str, np.ndarray] = {}
    chain = CHAIN_OF[stages[0]]
    for stage in reversed(list(chain.stages)):
        if stage in stages:
            own = stored_ids(chain.table(run, stage), where)
            # Mostly nothing is new: what left a later stage has passed this one.
            keys = union(keys, own)
            later[stage] = keys
    return later


def _entering(
    recipe: Recipe, run: RunDir, models: Models, stage: str, done: np.ndarray, retry_errors: bool
) -> Dataset | None:
    """Rows of the table before `stage` that are not done: new to the stream here."""
    where = pc.field("error").is_null() if retry_errors else None
    # Looked up only where something is done: a first run starts at once.
    if len(done) and among(_wanted(recipe, run, models, stage, where), done).all():
        return None
    chain = CHAIN_OF[stage]
    if chain.enters(stage):
        return _read(run.table(chain.source), chain, done, chain.expand(recipe, models), chain.queries)
    return _read(chain.table_before(run, stage), chain, done, _rows_as_they_are, where)


def _lost_videos(recipe: Recipe, run: RunDir) -> np.ndarray:
    """Rows that could not be scored because their video is damaged or gone: they are rendered again,
    and reach the score stage through the stream instead of from their table."""
    store = VideoStore(recipe.render.store or run.at("videos"))
    columns = ["candidate_id", "video_key", "error_stage"]
    rows = run.table("feedback").rows(columns, pc.field("error").is_valid())
    unscored = [row for row in rows if row["error_stage"] == "score" and row["video_key"] is not None]
    good = run.table("feedback").keys(pc.field("error").is_null()) if unscored else set()
    return id_set(
        row["candidate_id"]
        for row in unscored
        if row["candidate_id"] not in good and not store.has(row["video_key"])
    )


def _wanted(recipe: Recipe, run: RunDir, models: Models, stage: str, where: Any = None) -> np.ndarray:
    """The ids of every row that `stage` has to see, finished or not."""
    chain = CHAIN_OF[stage]
    if not chain.enters(stage):
        return stored_ids(chain.table_before(run, stage), where)
    expand = chain.expand(recipe, models)
    queries = (batch.to_pylist() for batch in run.table(chain.source).batches(where=chain.queries))
    return id_set(row[chain.key] for batch in queries for row in expand(batch))


def _read(
    source: Table, chain: Chain, ids: np.ndarray, expand: Any, where: Any, chosen: bool = False
) -> Dataset | None:
    """A table's rows, expanded to the chain's: those whose ids are `chosen`, or all but the ids."""
    parts = source.parts()
    if not parts or (chosen and not len(ids)):
        return None
    # The ids are stored once for all workers of a node.
    reference = ray.put(ids)
    dataset = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=min(len(parts), 1000)
    )
    return dataset.map_batches(
        partial(
            _read_parts, source=source, chain=chain, where=where, expand=expand, ids=reference, chosen=chosen
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
    )


def _read_parts(
    batch: pa.Table, source: Table, chain: Chain, where: Any, expand: Any, ids: Any, chosen: bool
) -> Any:
    known = ray.get(ids)
    for part in batch["part"].to_pylist():
        for stored in source.batches(where=where, parts=[part]):
            rows = expand(stored.to_pylist())
            found = among(np.array([row[chain.key] for row in rows], ID), known)
            mine = [row for row, is_in in zip(rows, found, strict=True) if is_in == chosen]
            yield stream_block(mine, chain.schema)


def _rows_as_they_are(rows: list[Row]) -> list[Row]:
    return rows


def _drain(dataset: Dataset, progress: Any, recipe: Recipe) -> None:
    """Run the stream to its end; the driver sees ids and errors only."""
    limits = recipe.limits
    finished = errors = 0
    _configure(dataset)
    with StatusTable(progress), _explained():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            finished += batch.num_rows
            errors += batch.num_rows - batch["error"].null_count
            if (stop := first_stop(batch)) is not None:
                raise StoppedError(stop["reason"], stop["node"])
            if finished >= limits.min_rows and errors > limits.max_error_share * finished:
                reasons = batch["error"].drop_null().unique().to_pylist()[:3]
                raise GenerationError(
                    f"{errors} of {finished} rows failed, over limits.max_error_share "
                    f"{limits.max_error_share}. The last reasons: {reasons}. "
                    "Fix the cause and run again with --retry-errors"
                )


@contextmanager
def _explained() -> Iterator[None]:
    """Ray's error for a replica that cannot start is a page of traces; its last line is the cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise GenerationError(
            f"a replica failed to start or work: {cause}\n"
            "`vpo -v` shows the workers' output, with the root cause above this line"
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


def _unfinished(
    recipe: Recipe, run: RunDir, models: Models, stages: Sequence[str], enter: np.ndarray | None
) -> int:
    have = stored_ids(CHAIN_OF[stages[-1]].table(run, stages[-1]))
    if enter is None:
        wanted = _wanted(recipe, run, models, stages[0])
    else:
        wanted = union(enter, stored_ids(run.table("renders")))
    return int(np.count_nonzero(~among(wanted, have)))


def _give_up(
    recipe: Recipe, run: RunDir, models: Models, stages: Sequence[str], enter: np.ndarray | None
) -> None:
    """Turn rows that no pass could finish into error rows of the stage that they died in."""
    reason = f"the process died under this row in each of {recipe.limits.tries} passes"
    chain = CHAIN_OF[stages[0]]
    for position, stage in enumerate(stages):
        tables = [chain.table(run, name) for name in stages[position:]]
        have = set().union(*(target.keys() for target in tables))
        rows: Iterable[Row] = chain.rows_before(recipe, run, models, stage)
        if stage == "render" and enter is not None:
            taken = {candidate.decode() for candidate in enter.tolist()}
            rows = (row for row in rows if row["candidate_id"] in taken)
        dead = [failed(row, stage, reason) for row in rows if row[chain.key] not in have]
        for target in tables:
            target.append(dead)
