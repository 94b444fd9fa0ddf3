"""The loop that a recipe describes: curate, draft or evolve, SFT, generate feedback, pair, DPO, one answer;
with `rl` in place of `dpo`, groups and RL in place of pairs and DPO.

`vpo run` calls `run_loop`; each phase is also a command. Every phase finds out from the run
directory what is done, so running again goes on where the last run stopped, or does nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vpo_ray.files.folder import StorageError
from vpo_ray.loop.curation import curate_run, warn_of_other_input
from vpo_ray.loop.evolution import evolve_prompts
from vpo_ray.loop.grouping import make_groups
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.opening import accounted, opened, write_ledger
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.policies import (
    LoopError,
    Start,
    learnt_id,
    may_retry,
    policy_id,
    refuse_other_policy,
    training_rows,
)
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Recipe, locate
from vpo_ray.records import Row
from vpo_ray.stages import spec
from vpo_ray.stages.curate import wants_workers
from vpo_ray.storage.images import shown_images
from vpo_ray.storage.run_dir import CURATED, ROUND, SFT_DROPPED, RunDir
from vpo_ray.storage.run_state import note
from vpo_ray.storage.sft_data import distinct, draft_rows, write_chat
from vpo_ray.stream.connection import connect
from vpo_ray.stream.progress import spilled_so_far

if TYPE_CHECKING:
    from vpo_ray.train.examples import Phase

logger = logging.getLogger(__name__)

_QUICK = ("curate", "pair", "report")  # phases that a log need not tell the begin of

# What makes the pages about a run, and what goes on while the run's last phase trains the policy `Start`.
Report = Callable[[RunDir, Recipe], object]
Beside = Callable[[RunDir, Start], AbstractContextManager[object]]


def curate_queries(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> None:
    """Fill `queries/` and `dropped/`; see `curation.curate_run`."""
    if run.exists(CURATED):
        warn_of_other_input(recipe, run)
        return
    if wants_workers(recipe.queries) or recipe.queries.unsafe_judge:
        connect()
    curate_run(recipe, run, retry_errors)


def draft_sft(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> dict[str, Any]:
    """Write SFT data for the queries of the sft split into `drafts/`, and as chat-format Parquet.

    Raises:
        LoopError: the recipe has no draft section, or no draft is fit to be learnt.
    """
    from vpo_ray.stream.pipeline import Models, generate

    if recipe.draft is None:
        raise LoopError("the recipe has no draft section: add one, or name SFT data in sft.data")
    if retry_errors and recipe.sft is not None and recipe.sft.data is None:
        retry_errors = may_retry(run, "drafts")
    counts = generate(recipe, run, Models("", ""), ("draft",), retry_errors)
    if not write_chat(run, draft_rows(run)):
        entry = build_ledger(run, recipe)["stages"]["draft"]
        reasons = {**entry["errored"], **entry["dropped"]}
        listed = "\n  ".join(f"{n:6} {reason}" for reason, n in reasons.items())
        raise LoopError(
            "no draft is fit to be learnt:\n  "
            + (listed or "no query is in the sft split: give queries.splits.sft a share")
        )
    return counts


def train_sft(recipe: Recipe, run: RunDir) -> str:
    """The folder of the policy to sample: trained by SFT, or the base model where there is none."""
    if recipe.sft is None:
        return locate(recipe.policy.model)
    identity = policy_id(recipe, run)
    refuse_other_policy(recipe, run, identity)
    rows, again = distinct(training_rows(recipe, run))
    run.table("sft").replace(rows)
    run.write_json(SFT_DROPPED, {"duplicate": again} if again else {})
    start = Start(locate(recipe.policy.model), identity)
    return _train(recipe, run, "sft", start, list(run.table("sft").rows()), identity)


def starting_policy(recipe: Recipe, run: RunDir, trained: bool = True) -> Start:
    """What this run samples: in a later round what the round before left (see vpo_ray.loop.rounds), else
    the policy after SFT; `trained=False` is for stages that do not sample."""
    if run.exists(ROUND):
        return Start(**run.read_json(ROUND)["start"])
    return Start(train_sft(recipe, run) if trained else recipe.policy.model, policy_id(recipe, run))


def train_dpo(recipe: Recipe, run: RunDir, start: Start) -> str:
    """The folder of the policy after DPO on the run's pairs."""
    rows = sorted(run.table("pairs").rows(), key=lambda row: row["pair_id"])
    return _train(recipe, run, "dpo", start, rows, learnt_id(recipe, run, start))


def train_rl(recipe: Recipe, run: RunDir, start: Start) -> str:
    """The folder of the policy after RL on the run's groups. Raises LoopError without an `rl` section."""
    if recipe.rl is None:
        raise LoopError("the recipe has no rl section: add one (docs/training.md), or run `vpo dpo`")
    rows = sorted(run.table("groups").rows(), key=lambda row: row["group_id"])
    return _train(recipe, run, "rl", start, rows, learnt_id(recipe, run, start))


def prepare_feedback(recipe: Recipe, run: RunDir) -> int:
    """Make what the recipe's last phase learns from of `feedback/`: groups for RL, else pairs."""
    return make_groups(recipe, run) if recipe.rl is not None else make_pairs(recipe, run)


def _learn(recipe: Recipe, run: RunDir, start: Start) -> str:
    return train_rl(recipe, run, start) if recipe.rl is not None else train_dpo(recipe, run, start)


def _train(recipe: Recipe, run: RunDir, phase: Phase, start: Start, rows: list[Row], identity: str) -> str:
    from vpo_ray.train import PhaseSpec, train

    settings = {"sft": recipe.sft, "dpo": recipe.dpo, "rl": recipe.rl}[phase]
    assert settings is not None
    spec = PhaseSpec(
        phase=phase,
        settings=settings,
        model=start.policy,
        task_prompt=read_prompt(recipe.policy.task_prompt),
        out=run.at(f"checkpoints/{phase}"),
        run_uri=run.uri,
        seed=recipe.seed,
        fingerprint=identity,
        revision=recipe.policy.revision,
        trust_remote_code=recipe.policy.trust_remote_code,
        chat_template_kwargs=recipe.policy.chat_template_kwargs,
        reference=start.reference,
        sampler=start.sampler if phase == "rl" else None,
        run_name=recipe.name,
        profiles={name: profile.model_dump(mode="json") for name, profile in recipe.profiles.items()},
        placement_timeout_s=recipe.limits.placement_timeout_s,
        images=shown_images(recipe, run, recipe.policy.images),
        image_arguments=recipe.sample.engine.engine_kwargs.get("mm_processor_kwargs") or {},
    )
    return train(spec, rows).out


def train_what_is_due(recipe: Recipe, run: RunDir) -> None:
    """SFT where the recipe has it; then, once every candidate has its feedback, pairs and DPO, or groups and
    RL.

    Raises:
        LoopError: there is nothing to train, generation is half done, or no pair was found.
    """
    if recipe.sft is None and recipe.learns is None:
        raise LoopError("the recipe has no sft, dpo or rl section: there is nothing to train")
    start = starting_policy(recipe, run)
    if recipe.learns is None:
        return
    if not run.table("feedback").parts():
        if recipe.sft is None:
            raise LoopError(f"{run.at('feedback')} holds nothing to train on: run `vpo generate` first")
        logger.info("SFT is done; %s waits for `vpo generate`", recipe.learns.upper())
        return
    streamed = spec.names("generation")
    missing = [line for line in reconcile(build_ledger(run, recipe)) if line.split(":")[0] in streamed]
    if missing:
        raise LoopError("generation is not done, run `vpo generate` again:\n  " + "\n  ".join(missing))
    prepare_feedback(recipe, run)
    _learn(recipe, run, start)


def generate_feedback(
    recipe: Recipe,
    run: RunDir,
    start: Start,
    stages: tuple[str, ...] | None = None,
    retry_errors: bool = False,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Candidates of the policy with their feedback; see `pipeline.generate`."""
    from vpo_ray.stream.pipeline import generate

    refuse_other_policy(recipe, run, start.sampled.policy_id)
    return generate(recipe, run, start.sampled, stages or spec.names("generation"), retry_errors, stop)


def run_loop(
    recipe: Recipe,
    retry_errors: bool = False,
    example: bool = True,
    report: Report | None = None,
    beside: Beside = lambda run, start: nullcontext(),
) -> RunDir:
    """Everything, in order; see the module's first line.

    Args:
        example: serve one query at the end, unless the recipe says no (`serve.example`).
        report: called last, while the run directory is still this driver's.
        beside: entered while the last phase trains.
    """
    with opened(recipe) as run, accounted(recipe, run):
        _phases(recipe, run, retry_errors, example, beside)
        if report is not None:
            _say("report", run)
            report(run, recipe)
    return run


def _phases(recipe: Recipe, run: RunDir, retry_errors: bool, example: bool, beside: Beside) -> None:
    entered: dict[str, float] = {}

    def enter(phase: str, more: str = "") -> None:
        entered[phase] = time.monotonic()
        _say(phase + more, run)

    enter("curate")
    curate_queries(recipe, run, retry_errors)
    later_round = run.exists(ROUND)
    if recipe.drafts_first and not later_round:
        enter("draft")
        draft_sft(recipe, run, retry_errors)
    if recipe.evolves_first and not later_round:
        enter("evolve")
        evolve_prompts(recipe, run, retry_errors)
    if recipe.sft is not None and not later_round:
        enter("sft")
    start = starting_policy(recipe, run)
    enter("generate", f": {', '.join(spec.names('generation'))}")
    spilled = spilled_so_far()
    did: dict[str, Any] = {"generated": generate_feedback(recipe, run, start, retry_errors=retry_errors)}
    did["spilled_bytes"] = spilled_so_far() - spilled
    write_ledger(recipe, run)
    enter("group" if recipe.learns == "rl" else "pair")
    did["groups" if recipe.learns == "rl" else "pairs"] = prepare_feedback(recipe, run)
    if recipe.learns is not None:
        enter(recipe.learns)
        with beside(run, start):
            policy = _learn(recipe, run, start)
        if example and recipe.serve.example and not run.exists("example.json"):
            enter("serve one query")
            write_example(recipe, run, policy)
    ended = time.monotonic()
    did["wall_seconds"] = round(ended - entered["curate"], 1)
    ends = [*entered.values(), ended][1:]
    did["phases"] = {phase: round(end - entered[phase], 1) for phase, end in zip(entered, ends, strict=True)}
    for problem in write_ledger(recipe, run, did):
        logger.warning("the ledger does not add up: %s", problem)


def write_example(recipe: Recipe, run: RunDir, policy: str) -> None:
    """`example.json`: a query, a candidate of the SFT policy, and what the trained policy serves. A policy
    that gives no answer (one that thinks past its `max_tokens`, for instance) leaves none, and so does a
    cluster with an endpoint of its own."""
    from openai import APIStatusError

    from vpo_ray.serve.run import ServeRunsError, ask

    written = {
        row["query_id"]: row
        for row in run.table("candidates").rows(["query_id", "query", "k", "prompt"])
        if row["k"] == 0 and row["prompt"]
    }
    if not written:
        raise StorageError(f"{run.at('candidates')} holds no prompt to compare with")
    first = min(written.values(), key=lambda row: (len(row["query"]), row["query_id"]))
    try:
        answer = ask(policy, recipe.serve, first["query"])
    except APIStatusError as error:
        logger.warning("the trained policy gives no example: %s", error)
        return
    except ServeRunsError:
        logger.warning("the trained policy gives no example: Ray Serve already runs on this cluster")
        return
    written_by = recipe.learns or "dpo"
    run.write_json("example.json", {"query": first["query"], "sft": first["prompt"], written_by: answer})


def _say(phase: str, run: RunDir) -> None:
    logger.log(logging.DEBUG if phase in _QUICK else logging.INFO, "%s → %s", phase, run.uri)
    note(run, doing=phase, view=None)
