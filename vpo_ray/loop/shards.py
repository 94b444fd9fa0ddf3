"""Shards: `vpo generate --shard 3/8`. Several drivers fill one run directory at one time, each from its
own part of the queries.

A shard's driver only adds rows and videos. Curation and SFT come before it, by `vpo curate` and `vpo sft`;
the command without `--shard` merges the parts of the tables, counts them into the ledger and goes on with
what is left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vpo_ray.loop.opening import opened
from vpo_ray.loop.phases import generate_feedback, starting_policy
from vpo_ray.loop.policies import LoopError, Start, policy_id
from vpo_ray.recipe import Recipe
from vpo_ray.records import Shard
from vpo_ray.stages import spec
from vpo_ray.storage.run_dir import CURATED, ROUND, RunDir
from vpo_ray.storage.run_state import working
from vpo_ray.stream.connection import connect

logger = logging.getLogger(__name__)


def generate_shard(
    recipe: Recipe,
    shard: Shard,
    stages: Sequence[str] | None = None,
    retry_errors: bool = False,
    verbose: bool = False,
) -> dict[str, dict[str, float]]:
    """Take one shard's queries through consecutive candidate stages, or all; see `pipeline.generate`.

    Args:
        verbose: see `connection.connect`.

    Raises:
        LoopError: the run's queries are not curated, or its policy is not trained yet.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    stages = tuple(stages or spec.names("generation"))
    with opened(recipe, shard) as run:
        if not run.exists(CURATED):
            raise LoopError(f"{run.uri} has no queries yet: run `vpo curate` once, before the shards")
        start = _start(recipe, run, trained="sample" in stages)
        connect(verbose)
        logger.info("shard %s: %s → %s", shard, ", ".join(stages), run.uri)
        own = RunDir(run.uri, shard)
        with working(own):
            return generate_feedback(recipe, own, start, stages, retry_errors)


def _start(recipe: Recipe, run: RunDir, trained: bool) -> Start:
    """What the run samples; nothing is trained here."""
    if not trained or recipe.sft is None or run.exists(ROUND):
        return starting_policy(recipe, run, trained)
    from vpo_ray.train.model_files import marker

    start = Start(run.at("checkpoints/sft"), policy_id(recipe, run))
    done = marker(start.policy)
    if done is None or done["fingerprint"] != start.identity:
        raise LoopError(f"{start.policy} is not trained yet: run `vpo sft` once, before the shards")
    return start
