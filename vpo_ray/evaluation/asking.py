"""What an evaluation asks an LLM, in a run directory of its own: any stage that is a chain by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vpo_ray.files.folder import chunks
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages.chains import Models, chain_of
from vpo_ray.storage.run_dir import ROUND, RunDir

_ROWS_PER_PART = 10_000


def answers_of(
    own: Recipe, run: RunDir, stage: str, rows: Iterable[Row], retry_errors: bool
) -> Iterator[Row]:
    """The stage's rows for these, asked or kept from before.

    Args:
        own: the recipe of the run directory that is asked in, one of those in `evaluation/` of `run`.
        rows: of the table that the stage's chain reads; those that it has are not written again.

    Raises:
        PlacementError, GenerationError: see `pipeline.generate`.
        OtherRecipeError, RunInUseError, RunLostError: see `opening.opened`.
    """
    from vpo_ray.stream.pipeline import generate

    chain = chain_of(stage)
    with opened(own) as folder:
        with accounted(own, folder):
            folder.write_json(ROUND, {"evaluates": run.uri})
            source = folder.table(chain.source)
            known = source.keys()
            wanted = {row[source.key]: row for row in rows}
            for part in chunks((row for key, row in wanted.items() if key not in known), _ROWS_PER_PART):
                source.append(part)
            if wanted:
                generate(own, folder, Models("", ""), (stage,), retry_errors)
        write_ledger(own, folder)
    return (row for row in chain.table(folder, stage).rows() if row[chain.key] in wanted)
