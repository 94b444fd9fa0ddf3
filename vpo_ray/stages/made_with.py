"""What a stage's rows are made with beyond the recipe's own text, so that one table never mixes two.

The recipe names files and models, and their content may change under the same name; so may the engines
that are installed. `made_with/<stage>.json` of the run directory says what the first rows of a stage were
made with, and rows are only added with the same. What is finished can be read with anything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from vpo_ray.recipe import Recipe
from vpo_ray.stages import spec
from vpo_ray.stages.chains import chain_of
from vpo_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)

Facts = dict[str, str]


class OtherInputsError(ValueError):
    """A stage's rows were made with something else than is here now; the message says what."""


def refuse_other_inputs(recipe: Recipe, run: RunDir, stages: Iterable[str]) -> None:
    """Call it before the stages make rows; notes what they are made with where they have none yet.

    Raises:
        OtherInputsError: a stage has good rows that were made with other inputs or engines.
    """
    for stage in stages:
        name = f"made_with/{stage}.json"
        now = facts(recipe, stage)
        # A shard's rows are made beside those of others, which may not be there yet.
        if run.exists(name) and (run.shard is not None or _has_rows(run, stage)):
            then: Facts = run.read_json(name)
            changed = [
                f"{key}: {then[key]} -> {now[key]}"
                for key in sorted(then.keys() & now.keys())
                if then[key] != now[key]
            ]
            if changed:
                raise OtherInputsError(
                    f"{chain_of(stage).table(run, stage).uri} was made with other inputs or engines than are "
                    "here now:\n  " + "\n  ".join(changed) + "\nPut the old ones back, or give the recipe "
                    f"another `out`. To have both in one table, delete {run.at(name)}"
                )
            now = {**now, **then}
        run.write_json(name, now)


def facts(recipe: Recipe, stage: str) -> Facts:
    """What a stage's rows depend on, by a name for messages. What cannot be read here, where it need not
    be, is left out."""
    return dict(spec.stage(stage).facts(recipe))


def _has_rows(run: RunDir, stage: str) -> bool:
    """Whether the stage has made a row that is good; others only passed through its table."""
    rows = chain_of(stage).table(run, stage).rows(["seconds", "error"])
    return any(row["error"] is None and (row["seconds"] or {}).get(stage) is not None for row in rows)
