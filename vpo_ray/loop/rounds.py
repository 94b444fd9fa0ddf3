"""Rounds: `vpo run --rounds N`. The policy of one round samples the pairs of the next.

Round 1 is the run directory itself, round n is `rounds/<n>` in it and is a run directory like
any other; its `round.json` says which policy it starts from. Queries, videos, kept answers and the
account of what was paid are shared by all rounds. Every round finds out what is done, so the same
command goes on where it stopped, and a greater N adds rounds.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from vpo_ray.files.folder import join
from vpo_ray.loop.curation import take_curated
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.phases import Report, run_loop, starting_policy
from vpo_ray.loop.policies import LoopError, Start, learnt_id
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import CURATED, ROUND, RunDir
from vpo_ray.storage.run_lock import driving

logger = logging.getLogger(__name__)


def run_rounds(
    recipe: Recipe, rounds: int, retry_errors: bool = False, report: Report | None = None
) -> RunDir:
    """Run the loop `rounds` times; returns the last round's run directory.

    DPO, or RL, of a later round starts from the policy of the round before. Its reference is that policy
    too, or with `reference: kept` the one that the first round started from. `report` is called for
    every round's directory; see `run_loop`.

    Raises:
        LoopError: rounds need a dpo or rl section that leaves a whole model.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    if rounds > 1:
        _check(recipe)
    with driving(recipe.out):
        return _rounds(recipe, rounds, retry_errors, report)


def _rounds(recipe: Recipe, rounds: int, retry_errors: bool, report: Report | None) -> RunDir:
    first = run = run_loop(recipe, retry_errors, rounds == 1, report)
    reference = starting_policy(recipe, first).policy if _keeps(recipe) and rounds > 1 else None
    for number in range(2, rounds + 1):
        before = starting_policy(recipe, run)
        start = Start(run.at(f"checkpoints/{recipe.learns}"), learnt_id(recipe, run, before), reference)
        later = recipe.model_copy(
            update={
                "out": join(first.uri, f"rounds/{number}"),
                "render": recipe.render.model_copy(
                    update={"store": recipe.render.store or first.at("videos")}
                ),
            }
        )
        with accounted(recipe, first), opened(later) as run:
            run.write_json(ROUND, {"round": number, "of": first.uri, "start": asdict(start)})
            if not run.exists(CURATED):
                take_curated(run, first)
            logger.info("round %d of %d", number, rounds)
            run_loop(later, retry_errors, number == rounds, report)
        # What the round paid is in the first round's account.
        write_ledger(recipe, first, first.read_json("ledger.json").get("last_run"))
    return run


def _keeps(recipe: Recipe) -> bool:
    return recipe.learning is not None and recipe.learning.reference == "kept"


def _check(recipe: Recipe) -> None:
    if recipe.learning is None:
        raise LoopError("--rounds needs a dpo or rl section: its policy samples the next round")
    if recipe.learning.lora is not None and not recipe.learning.lora.merge:
        raise LoopError(
            f"--rounds needs {recipe.learns}.lora.merge true: the next round samples from a whole model"
        )
