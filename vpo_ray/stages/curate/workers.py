"""Curation's work on each batch, by Ray Data tasks instead of this process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.files.folder import StorageError
from vpo_ray.recipe import Queries
from vpo_ray.stages.curate.images import QueryImages
from vpo_ray.stages.curate.prepare import prepare_batch, schema
from vpo_ray.stages.curate.read import RAW, InputError, InputFile, read_batches
from vpo_ray.stages.curate.rules import RulesError

ROWS_PER_TASK = 10_000
# What ends curation, wherever it is found.
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (InputError, RulesError, StorageError)}
_FAILED = -1  # in place of a reason: the row's text says why the file cannot be read


def prepare_on_ray(
    files: Sequence[InputFile], settings: Queries, images: QueryImages | None = None
) -> Iterator[pa.Table]:
    """Prepared batches of all files, in any order. Ray must be initialised.

    Raises:
        InputError: a file cannot be read.
        RulesError: a rule cannot be applied on a worker (the keyword file is not there).
        StorageError: an image cannot be stored.
    """
    import ray
    from ray.data import TaskPoolStrategy

    # Said of small input, where fewer tasks than allowed are all there is to do.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")
    workers = settings.workers
    cluster = ray.cluster_resources().get("CPU", 1)
    share = 1.0 if workers is None else min(1.0, cluster / workers)
    rows = ray.data.from_items([{"position": n} for n in range(len(files))], override_num_blocks=len(files))
    read = rows.map_batches(
        partial(_read, files=list(files), settings=settings),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=share / 2,  # it mostly waits for files
        compute=TaskPoolStrategy(workers),
    )
    prepared = read.repartition(target_num_rows_per_block=ROWS_PER_TASK).map_batches(
        partial(_prepare, settings=settings, images=images),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=share,
        compute=TaskPoolStrategy(workers),
    )
    for batch in prepared.iter_batches(batch_size=None, batch_format="pyarrow"):
        if batch.num_rows and batch["reason"][0].as_py() == _FAILED:
            kind, _, message = batch["text"][0].as_py().partition(" ")
            raise _ERRORS[kind](message)
        yield _own(batch)


def _read(batch: pa.Table, files: Sequence[InputFile], settings: Queries) -> Iterator[pa.Table]:
    for position in batch["position"].to_pylist():
        try:
            yield from read_batches(files, position, settings)
        except InputError as error:
            yield _failed(error, RAW)


def _prepare(batch: pa.Table, settings: Queries, images: QueryImages | None) -> pa.Table:
    wanted = schema(settings)
    failed = batch.filter(pc.equal(batch["reason"], _FAILED)) if batch.num_rows else batch
    if failed.num_rows:
        return _whole(failed.slice(0, 1), wanted)
    try:
        return prepare_batch(batch.cast(RAW), settings, images) if batch.num_rows else wanted.empty_table()
    except tuple(_ERRORS.values()) as error:
        return _failed(error, wanted)


def _failed(error: Exception, wanted: pa.Schema) -> pa.Table:
    row = {"text": [f"{type(error).__name__} {error}"], "reason": [_FAILED]}
    return _whole(pa.table(row), wanted)


def _whole(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The table with every wanted column, null where it has none."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


def _own(batch: pa.Table) -> pa.Table:
    """A copy outside Ray's object store, whose memory is given back."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_all()
