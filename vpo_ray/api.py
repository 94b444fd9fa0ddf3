"""The functions of the Python API (docs/python.md): the commands of `vpo` call them too.

They are given out by `vpo_ray` itself. Everything is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.evaluation.evaluate import Evaluated
    from vpo_ray.loop.refine import Refined
    from vpo_ray.plan.cluster import Cluster
    from vpo_ray.plan.estimate import Plan
    from vpo_ray.recipe import Recipe, Serve
    from vpo_ray.records import Shard
    from vpo_ray.storage.run import Run
    from vpo_ray.storage.run_dir import RunDir


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from its YAML file, with `key.path=value` overrides as `--set` takes them.

    Raises:
        RecipeError: the file cannot be used; the message names each key.
    """
    from vpo_ray import recipe

    return recipe.load(path, overrides)


def plan(
    recipe: Recipe,
    cluster: Cluster | None = None,
    ledger: str | None = None,
    price: float | None = None,
    *,
    queries: int | None = None,
    incomplete: bool = False,
) -> Plan:
    """Check a recipe and say what it will take: rows, hours of replicas, GPU-hours, hours of wall time.

    Args:
        cluster: what it is to run on, by `plan.cluster.described(16, "H100")` or `live("auto")`.
        ledger: run directory or ledger.json of a past run to take times from; the recipe's own if None.
        price: of a GPU-hour, in any currency.
        queries: so many are taken to be read, instead of looking.
        incomplete: plan what can be planned without files that are not on this machine; `missing` lists them.

    Raises:
        PlanError: something that the recipe names is not there, or the cluster has no room.
    """
    from vpo_ray.plan import plan

    return plan(recipe, cluster, ledger, price, queries, incomplete)


def run(recipe: Recipe, *, rounds: int = 1, retry_errors: bool = False, verbose: bool = False) -> Run:
    """The whole loop, or what is left of it; joins the Ray cluster of RAY_ADDRESS, or starts one here.

    Args:
        rounds: repeat it from sampling on with the policy that DPO left.
        retry_errors: take rows that failed once more.
        verbose: show the workers' output.

    Returns:
        The run directory of the last round.

    Raises:
        PlanError: something that the recipe names is not there.
        LoopError, GenerationError, PlacementError: it cannot go on; what was made is kept.
        OtherRecipeError, RunInUseError: the run directory is another recipe's, or another driver works there.
    """
    from vpo_ray.loop.rounds import run_rounds
    from vpo_ray.plan import check_recipe
    from vpo_ray.report import build_report
    from vpo_ray.report.run_trackers import track_run
    from vpo_ray.storage.run import Run
    from vpo_ray.stream.connection import connect

    def report(run: RunDir, recipe: Recipe) -> str:
        page = build_report(run, recipe)
        track_run(run, recipe)
        return page

    check_recipe(recipe)
    connect(verbose)
    return Run(run_rounds(recipe, rounds, retry_errors, report).uri)


def generate(
    recipe: Recipe,
    stages: Sequence[str] | None = None,
    *,
    shard: Shard | None = None,
    retry_errors: bool = False,
    verbose: bool = False,
) -> Run:
    """Candidates, verdicts, videos and scores of the recipe's queries, which are curated first.

    Args:
        stages: consecutive ones of sample, judge, render, score, from the tables that are there.
        shard: `Shard(3, 8)` takes the third of eight parts of the queries, beside other drivers.

    Raises: what `run` raises.
    """
    from vpo_ray.loop import commands, shards
    from vpo_ray.storage.run import Run

    if shard is not None:
        shards.generate_shard(recipe, shard, stages, retry_errors, verbose)
    elif stages:
        commands.run_stages(recipe, stages, retry_errors, verbose)
    else:
        commands.run_phase(recipe, "generate", retry_errors, verbose)
    return Run(recipe.out)


def train(recipe: Recipe, phase: str | None = None, *, verbose: bool = False) -> Run:
    """SFT, and once every candidate has its feedback, pairs and DPO.

    Args:
        phase: "sft" or "dpo", that one alone.

    Raises:
        LoopError, TrainError: there is nothing to train on, or it cannot be trained; and see `run`.
    """
    from vpo_ray.loop.commands import run_phase
    from vpo_ray.storage.run import Run

    run_phase(recipe, phase or "train", verbose=verbose)
    return Run(recipe.out)


def refine(
    recipe: Recipe,
    query: str,
    *,
    image: str | None = None,
    budget: int = 8,
    retry_errors: bool = False,
    verbose: bool = False,
) -> Refined:
    """The best prompt of one query that so many videos find: its prompts evolve against the recipe's rewards,
    as the `evolve` section says. Asked again, it is read from the run directory.

    Args:
        image: path or URI of the query's image, for a model that makes videos from images.
        budget: videos at most, the query's own among them.

    Returns:
        `prompt`, `videos`, why the evolution `ended`, and its `trace`: rows of EVOLUTION.

    Raises:
        LoopError: no prompt passes; the message counts why. And see `run`.
    """
    from vpo_ray.loop.refine import refine
    from vpo_ray.plan import check_recipe

    check_recipe(recipe)
    return refine(recipe, query, budget, retry_errors, verbose, image)


def evaluate(
    recipe: Recipe, *, vbench: Sequence[str] = (), retry_errors: bool = False, verbose: bool = False
) -> Evaluated:
    """Policies side by side on held-out queries, as the `evaluate` section of the recipe says; the user's
    words, and the policy before and after DPO on the eval split where it has none.

    Args:
        vbench: results files of VBench's own command, on videos that it was given by `vpo evaluate --export`.

    Returns:
        `results`, a dictionary as `results.json` has it; `samples()`, `comparisons()`, and the `folder`.

    Raises:
        LoopError: a policy is not trained, or there is no query; and see `run`.
        SetError: a set of queries or a file of prompts is not what it should be.
    """
    from vpo_ray.evaluation import evaluate
    from vpo_ray.loop.commands import run_work
    from vpo_ray.report.evaluation_page import write_evaluation_page
    from vpo_ray.report.run_trackers import track_run

    def work(recipe: Recipe, run: RunDir, retry_errors: bool) -> Evaluated:
        found = evaluate.evaluate(recipe, run, retry_errors, vbench)
        write_evaluation_page(found.results, found.samples(), found.comparisons(), found.folder)
        track_run(run, recipe, found)
        return found

    done: Evaluated = run_work(recipe, work, retry_errors, verbose)
    return done


def serve(checkpoint: str, settings: Serve | None = None, *, verbose: bool = False) -> None:
    """Serve a trained policy behind an OpenAI-compatible endpoint until SIGINT or SIGTERM.

    Args:
        checkpoint: folder or URI.
        settings: the `serve` section of a recipe; its defaults if None.

    Raises: what `serve.run.serving` raises.
    """
    from vpo_ray import recipe
    from vpo_ray.serve.run import serve_forever
    from vpo_ray.stream.connection import connect

    connect(verbose)
    serve_forever(recipe.locate(checkpoint), settings or recipe.Serve())
