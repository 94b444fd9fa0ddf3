"""A phase of the loop by itself, as `vpo NAME recipe.yaml` runs it: in its run directory, with a ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vpo_ray.loop import phases
from vpo_ray.loop.evolution import evolve_prompts
from vpo_ray.loop.grouping import make_groups
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.connection import connect

# A recipe, its run directory, and whether rows that failed are taken once more.
Phase = Callable[[Recipe, RunDir, bool], Any]


def _generate(recipe: Recipe, run: RunDir, retry_errors: bool) -> dict[str, Any]:
    phases.curate_queries(recipe, run, retry_errors)
    return phases.generate_feedback(recipe, run, phases.starting_policy(recipe, run), None, retry_errors)


def _grouped(recipe: Recipe, run: RunDir) -> int:
    if recipe.rl is None:
        raise LoopError(
            "the recipe has no rl section, whose groups they would be: `vpo pair` makes pairs for dpo"
        )
    return make_groups(recipe, run)


# Those beside the candidate stages.
PHASES: dict[str, Phase] = {
    "curate": phases.curate_queries,
    "draft": phases.draft_sft,
    "evolve": evolve_prompts,
    "sft": lambda recipe, run, _: phases.starting_policy(recipe, run),
    "generate": _generate,
    "pair": lambda recipe, run, _: make_pairs(recipe, run),
    "group": lambda recipe, run, _: _grouped(recipe, run),
    "dpo": lambda recipe, run, _: phases.train_dpo(recipe, run, phases.starting_policy(recipe, run)),
    "rl": lambda recipe, run, _: phases.train_rl(recipe, run, phases.starting_policy(recipe, run)),
    "train": lambda recipe, run, _: phases.train_what_is_due(recipe, run),
}
WITHOUT_RAY = frozenset({"curate", "pair", "group"})  # curation asks for it where its input is large


def run_phase(recipe: Recipe, name: str, retry_errors: bool = False, verbose: bool = False) -> Any:
    """One of PHASES, or one candidate stage; returns what its function does.

    Args:
        verbose: see `connection.connect`.

    Raises:
        LoopError, GenerationError, PlacementError: see the phase.
        OtherRecipeError, RunInUseError, RunLostError: see `opening.opened`.
    """
    work = PHASES.get(name) or _stages((name,))
    return run_work(recipe, work, retry_errors, verbose, name not in WITHOUT_RAY)


def run_stages(
    recipe: Recipe, stages: Sequence[str], retry_errors: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """Consecutive candidate stages as one stream; see `run_phase`."""
    counts: dict[str, Any] = run_work(recipe, _stages(tuple(stages)), retry_errors, verbose)
    return counts


def _stages(stages: tuple[str, ...]) -> Phase:
    def work(recipe: Recipe, run: RunDir, retry_errors: bool) -> dict[str, Any]:
        start = phases.starting_policy(recipe, run, trained="sample" in stages)
        return phases.generate_feedback(recipe, run, start, stages, retry_errors)

    return work


def run_work(
    recipe: Recipe, work: Phase, retry_errors: bool = False, verbose: bool = False, on_ray: bool = True
) -> Any:
    """Any function of a run directory, as a phase; see `run_phase`."""
    with opened(recipe) as run:
        with accounted(recipe, run):
            if on_ray:
                connect(verbose)
            result = work(recipe, run, retry_errors)
        write_ledger(recipe, run)
    return result
