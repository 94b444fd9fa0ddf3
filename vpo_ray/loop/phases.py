"""The loop as a recipe tells it: curate, draft, SFT, generate feedback, pair, DPO, one served answer.

`vpo run` calls `run_loop`; each phase is also a command. Every phase finds out from the run
directory what is done, so running again goes on where the last run stopped, or does nothing.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from vpo_ray.files.folder import StorageError
from vpo_ray.loop.curation import CURATED, curate_run, warn_of_other_input
from vpo_ray.loop.ledger import SFT_DROPPED, build_ledger
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Recipe, differences, locate, parse_stored
from vpo_ray.records import Row, candidate_id, content_id
from vpo_ray.stages.adaptive import videos_by_strategy
from vpo_ray.stages.curate import wants_workers
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.sample import identity_key
from vpo_ray.storage.run_dir import ROUND, RunDir
from vpo_ray.storage.run_lock import check, driving
from vpo_ray.storage.sft_data import distinct, draft_rows, sft_rows, write_chat
from vpo_ray.stream.connection import connect, terminate
from vpo_ray.stream.progress import spilled_bytes
from vpo_ray.versions import versions

logger = logging.getLogger(__name__)

# What makes the pages about a run.
Report = Callable[[RunDir, Recipe], object]


class OtherRecipeError(ValueError):
    """The run directory belongs to a recipe that computes something else; the message says what."""


@dataclass(frozen=True)
class Start:
    """The policy that a run samples and trains further.

    policy: its folder. identity: what it is by content, see policy_id. reference: the folder of
    DPO's reference where that is another policy.
    """

    policy: str
    identity: str
    reference: str | None = None


class LoopError(RuntimeError):
    """The loop cannot go on; the message says why and what to do."""


def open_run(recipe: Recipe) -> RunDir:
    """The recipe's run directory, made if absent.

    Raises:
        OtherRecipeError: the directory was made by a recipe that computes something else, or is no run's.
    """
    run = RunDir(recipe.out)
    if run.exists("recipe.yaml"):
        if not run.exists("versions.json"):
            raise OtherRecipeError(
                f"{run.uri} holds a recipe.yaml that no run wrote: give the recipe an `out` of its own"
            )
        # Parsed, so that a key which is newer than the run counts with its default.
        stored = parse_stored(yaml.safe_load(run.read("recipe.yaml")), run.at("recipe.yaml"))
        changed = differences(stored.dump(), recipe.dump())
        if changed:
            raise OtherRecipeError(
                f"{run.uri} was made by another recipe. These keys differ:\n  "
                + "\n  ".join(changed)
                + "\nGive the new recipe another `out`, or put the old values back"
            )
    # The recipe comes last: one without versions is somebody's own.
    run.write_json("versions.json", versions())
    run.write("recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False).encode())
    return run


@contextmanager
def opened(recipe: Recipe) -> Iterator[RunDir]:
    """`open_run`, and no other driver writes to the run directory meanwhile; see `run_lock`.

    Raises:
        OtherRecipeError: see `open_run`.
        RunInUseError, RunLostError: see `run_lock.driving`.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)  # the lock is given back
    with driving(recipe.out):
        yield open_run(recipe)


@contextmanager
def accounted(recipe: Recipe, run: RunDir) -> Iterator[None]:
    """Write the ledger of what was made when the work within does not come to its end, whatever the
    reason. What ended it is what goes on: a ledger that cannot be written is a line in the log."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            logger.warning("stopping: what was made is kept, and %s/ledger.json counts it", run.uri)
        try:
            write_ledger(recipe, run)
        except Exception as failure:
            trace = None if isinstance(failure, StorageError) else failure
            logger.warning("%s/ledger.json could not be written: %s", run.uri, failure, exc_info=trace)
        raise


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
        raise LoopError("the recipe has no draft section")
    counts = generate(recipe, run, Models("", ""), ("draft",), retry_errors)
    if not write_chat(run):
        entry = build_ledger(run, recipe)["stages"]["draft"]
        reasons = {**entry["errored"], **entry["dropped"]}
        listed = "\n  ".join(f"{n:6} {reason}" for reason, n in reasons.items())
        raise LoopError(
            "no draft is fit to be learnt:\n  "
            + (listed or "no query is in the sft split: give queries.splits.sft a share")
        )
    return counts


def training_rows(recipe: Recipe, run: RunDir) -> list[Row]:
    """What SFT learns: `sft.data` where the recipe names it, the run's drafts otherwise.

    Raises:
        LoopError: there are no drafts yet.
    """
    if recipe.sft is None:
        return []
    if recipe.sft.data is not None:
        return list(sft_rows(recipe.sft.data))
    rows = list(draft_rows(run))
    if not rows:
        raise LoopError(f"{run.at('drafts')} holds nothing to train on: run `vpo draft` first")
    return rows


def policy_id(recipe: Recipe, run: RunDir) -> str:
    """The identity of the policy that is sampled: model, task prompt, and how SFT makes it.

    It is a function of the recipe and its SFT data, not of the weights' bits, so that candidates
    have the same ids wherever the policy was trained.
    """
    policy = recipe.policy
    parts: list[Any] = [policy.model, policy.revision, read_prompt(policy.task_prompt), recipe.seed]
    if policy.chat_template_kwargs:
        parts.append({"chat_template_kwargs": policy.chat_template_kwargs})
    if recipe.sft is not None:
        rows = training_rows(recipe, run)
        parts += [recipe.fingerprint("sft"), [[row["query"], row["prompt"]] for row in rows]]
        learnt, _ = distinct(rows)
        if len({row["query_id"] for row in learnt}) < len(learnt):
            parts.append("every prompt of a query")  # earlier versions learnt one of them
    return content_id("policy", *parts, digits=16)


def refuse_other_policy(recipe: Recipe, run: RunDir, identity: str) -> None:
    """Raises LoopError where the run has candidates that this policy would not be asked for."""
    row = next(run.rows_of_stage("sample", ["candidate_id", "query_id", "k", "policy"]), None)
    if row is None or row["policy"] is None:
        return
    key = identity_key(recipe.sample, recipe.seed)
    if row["candidate_id"] != candidate_id(row["query_id"], row["k"], identity, key):
        raise LoopError(
            f"{run.at('candidates')} was sampled from another policy than this recipe's: its SFT data or "
            "task prompt changed since, or it was made by a version of vpo that learnt one prompt of a query "
            "only or did not look at engine_kwargs. Give the recipe another `out`"
        )


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


def dpo_id(recipe: Recipe, run: RunDir, start: Start) -> str:
    """The identity of the policy after DPO on the run's pairs."""
    pairs = sorted(run.table("pairs").keys())
    return content_id("dpo", start.identity, recipe.fingerprint("dpo"), pairs, digits=16)


def train_dpo(recipe: Recipe, run: RunDir, start: Start) -> str:
    """The folder of the policy after DPO on the run's pairs."""
    rows = sorted(run.table("pairs").rows(), key=lambda row: row["pair_id"])
    identity = dpo_id(recipe, run, start)
    return _train(recipe, run, "dpo", start, rows, identity)


def _train(
    recipe: Recipe, run: RunDir, phase: Literal["sft", "dpo"], start: Start, rows: list[Row], identity: str
) -> str:
    from vpo_ray.train import PhaseSpec, train

    settings = recipe.sft if phase == "sft" else recipe.dpo
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
        run_name=recipe.name,
        placement_timeout_s=recipe.limits.placement_timeout_s,
    )
    return train(spec, rows).out


def train_what_is_due(recipe: Recipe, run: RunDir) -> None:
    """SFT where the recipe has it; then, once every candidate has its feedback, pairs and DPO.

    Raises:
        LoopError: there is nothing to train, generation is half done, or no pair was found.
    """
    from vpo_ray.loop.ledger import reconcile

    if recipe.sft is None and recipe.dpo is None:
        raise LoopError("the recipe has neither an sft nor a dpo section: there is nothing to train")
    start = starting_policy(recipe, run)
    if recipe.dpo is None:
        return
    if not run.table("feedback").parts():
        if recipe.sft is None:
            raise LoopError(f"{run.at('feedback')} holds nothing to train on: run `vpo generate` first")
        logger.info("SFT is done; DPO waits for `vpo generate`")
        return
    streamed = ("sample", "judge", "render", "score")
    missing = [line for line in reconcile(build_ledger(run, recipe)) if line.split(":")[0] in streamed]
    if missing:
        raise LoopError("generation is not done, run `vpo generate` again:\n  " + "\n  ".join(missing))
    make_pairs(recipe, run)
    train_dpo(recipe, run, start)


def generate_feedback(
    recipe: Recipe,
    run: RunDir,
    start: Start,
    stages: tuple[str, ...] | None = None,
    retry_errors: bool = False,
) -> dict[str, Any]:
    from vpo_ray.stream.pipeline import STAGES, Models, generate

    refuse_other_policy(recipe, run, start.identity)
    models = Models(start.policy, start.identity)
    return generate(recipe, run, models, stages or tuple(STAGES), retry_errors)


def make_pairs(recipe: Recipe, run: RunDir) -> int:
    """Fill `pairs/` from `feedback/`, replacing what is there; count what either strategy renders.

    Raises:
        LoopError: no pair was found; the message counts the reasons.
    """
    reasons: Counter[str] = Counter()
    videos: Counter[str] = Counter()
    count = run.table("pairs").replace(_pairs(recipe, run, reasons, videos))
    run.write_json("pairs/reasons.json", dict(reasons))
    run.write_json("pairs/videos.json", dict(videos))
    if not count:
        for name in ("verdict", "error_stage"):
            values = Counter(row[name] for row in run.table("feedback").rows([name]) if row[name] is not None)
            reasons.update({f"candidates with {name} {value}": n for value, n in values.items()})
        listed = (
            "\n  ".join(f"{n:6} {reason}" for reason, n in reasons.most_common()) or "  there is no feedback"
        )
        raise LoopError(
            f"no preference pairs were found, so there is nothing to train on:\n  {listed}\n"
            "Lower pair.margin or pair.dominance, sample more (sample.k), or look at feedback/ for errors"
        )
    return count


def _pairs(recipe: Recipe, run: RunDir, reasons: Counter[str], videos: Counter[str]) -> Iterator[Row]:
    """Pairs by query. Queries are taken in 16 shares by id, so that only one share is in memory."""
    import pyarrow.compute as pc

    columns = ["candidate_id", "query_id", "query", "k", "prompt", "verdict", "refined_prompt",
               "refined_fault", "refined_verdict", "answers", "dimensions", "score", "more_rewards", "error",
               "error_stage"]  # fmt: skip
    for share in "0123456789abcdef":
        queries: dict[str, list[Row]] = {}
        for row in run.table("feedback").rows(columns, pc.starts_with(pc.field("query_id"), share)):
            queries.setdefault(row["query_id"], []).append(row)
        for key in sorted(queries):
            videos.update(videos_by_strategy(queries[key], recipe.pair))
            yield from pairs_of_query(queries[key], recipe.pair, reasons)


def run_loop(
    recipe: Recipe, retry_errors: bool = False, example: bool = True, report: Report | None = None
) -> RunDir:
    """Everything, in order; see the module's first line.

    Args:
        example: serve one query at the end.
        report: called last, while the run directory is still this driver's.
    """
    with opened(recipe) as run, accounted(recipe, run):
        _phases(recipe, run, retry_errors, example)
        if report is not None:
            _say("report", run)
            report(run, recipe)
    return run


def _phases(recipe: Recipe, run: RunDir, retry_errors: bool, example: bool) -> None:
    began = time.monotonic()
    _say("curate", run)
    curate_queries(recipe, run, retry_errors)
    later_round = run.exists(ROUND)
    if recipe.drafts_first and not later_round:
        _say("draft", run)
        draft_sft(recipe, run, retry_errors)
    if recipe.sft is not None and not later_round:
        _say("sft", run)
    start = starting_policy(recipe, run)
    _say("generate: sample, judge, render, score", run)
    spilled = spilled_bytes()
    did: dict[str, Any] = {"generated": generate_feedback(recipe, run, start, retry_errors=retry_errors)}
    did["spilled_bytes"] = spilled_bytes() - spilled
    write_ledger(recipe, run)
    _say("pair", run)
    did["pairs"] = make_pairs(recipe, run)
    if recipe.dpo is not None:
        _say("dpo", run)
        policy = train_dpo(recipe, run, start)
        if example and not run.exists("example.json"):
            _say("serve one query", run)
            write_example(recipe, run, policy)
    did["wall_seconds"] = round(time.monotonic() - began, 1)
    for problem in write_ledger(recipe, run, did):
        logger.warning("the ledger does not add up: %s", problem)


def write_example(recipe: Recipe, run: RunDir, policy: str) -> None:
    """`example.json`: a query, a candidate of the SFT policy, and what the trained policy serves. A policy
    that gives no answer (one that thinks past its `max_tokens`, for instance) leaves none."""
    from openai import APIStatusError

    from vpo_ray.serve.run import ask

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
    run.write_json("example.json", {"query": first["query"], "sft": first["prompt"], "dpo": answer})


def write_ledger(recipe: Recipe, run: RunDir, extra: dict[str, Any] | None = None) -> list[str]:
    """Write `ledger.json`; returns what does not add up (yet, where stages are still to run)."""
    from vpo_ray.loop.ledger import reconcile

    ledger = build_ledger(run, recipe)
    if extra:
        ledger["last_run"] = extra
    problems = reconcile(ledger)
    check(run)
    run.write_json("ledger.json", ledger)
    return problems


def _say(phase: str, run: RunDir) -> None:
    logger.info("%s → %s", phase, run.uri)
