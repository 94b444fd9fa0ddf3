"""Run directories in a run's own, where rows that others made go through stages: those of an evaluation,
`<run>/evaluation/<part>-<id>`, and of an evolution."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vpo_ray.files.folder import chunks
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.policies import Start
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages.chains import chain_of
from vpo_ray.storage.run_dir import CURATED, GIVEN, ROUND, RunDir
from vpo_ray.stream.pipeline import Models, generate

_ROWS_PER_PART = 10_000


def through(
    own: Recipe,
    run: RunDir,
    stages: Sequence[str],
    rows: Iterable[Row],
    retry_errors: bool,
    models: Models | None = None,
    start: Start | None = None,
    stop: threading.Event | None = None,
) -> RunDir:
    """Take rows through stages; what is done, now or earlier, is not done again.

    Args:
        own: the recipe of the run directory, whose `out` is in `evaluation/` or `evolution/` of `run`.
        stages: consecutive ones of a chain.
        rows: of the table that the first of them reads; those that it has are not written again.
        models, start: the policy, of stages that sample one.
        stop: see `pipeline.generate`.

    Raises:
        PlacementError, GenerationError: see `pipeline.generate`.
        OtherRecipeError, RunInUseError, RunLostError: see `opening.opened`.
    """
    chain = chain_of(stages[0])
    facts: dict[str, Any] = {"of": run.uri}
    if start is not None:
        facts["start"] = asdict(start)
    with opened(own) as folder:
        with accounted(own, folder):
            folder.write_json(ROUND, facts)
            source = chain.table_before(folder, stages[0])
            known = source.keys()
            wanted = {row[source.key]: row for row in rows}
            for part in chunks((row for key, row in wanted.items() if key not in known), _ROWS_PER_PART):
                source.append(part)
            entered = len(known | wanted.keys())
            folder.write_json(GIVEN, {"stages": list(stages), "rows": entered})
            if source.uri == folder.at("queries"):
                folder.write_json(CURATED, {"queries": entered, "dropped": 0})
            if wanted:
                generate(own, folder, models or Models("", ""), stages, retry_errors, stop)
        write_ledger(own, folder)
    return folder


def answers_of(
    own: Recipe, run: RunDir, stage: str, rows: Iterable[Row], retry_errors: bool
) -> Iterator[Row]:
    """A stage's rows for these, asked or kept from before; see `through`."""
    chain, given = chain_of(stage), list(rows)
    wanted = {row[chain.key] for row in given}
    folder = through(own, run, (stage,), given, retry_errors)
    return (row for row in chain.table(folder, stage).rows() if row[chain.key] in wanted)
