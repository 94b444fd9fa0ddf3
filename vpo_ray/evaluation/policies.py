"""The policies that an evaluation compares: who each is, and the prompts that it makes.

A policy that samples has run directories of its own in `<run>/evaluation/policy-<identity>`, one for each
seed and for each time that it is applied to its own output, filled by the stages of the loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpo_ray.evaluation.sets import SetError, prompts_of_file
from vpo_ray.files.image_files import image_hash
from vpo_ray.loop.phases import starting_policy
from vpo_ray.loop.policies import LoopError, Start, learnt_id, policy_id
from vpo_ray.loop.streams import through
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import ChatModel, EvaluatedPolicy, Evaluation, Recipe, locate, result_keys
from vpo_ray.records import Row, content_id, query_id, seed_of
from vpo_ray.stages.profiles import asked_alone
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.stream.pipeline import Models
from vpo_ray.train.model_files import identity as model_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rival:
    """A policy of an evaluation.

    Args:
        identity: what it is by content; two names of one policy share it.
        start: where it is sampled, of policies that are a model here.
        prompts: by query id, where they are there already.
    """

    name: str
    settings: EvaluatedPolicy
    identity: str
    start: Start | None = None
    prompts: Mapping[str, str] | None = None


def default_policies(recipe: Recipe, run: RunDir) -> dict[str, EvaluatedPolicy]:
    """The user's words, the policy before and after DPO or RL, and that of the last round."""
    kinds = ["query", "base" if recipe.sft is None else "sft", *([recipe.learns] if recipe.learns else [])]
    found = {kind: EvaluatedPolicy.model_validate({"kind": kind}) for kind in kinds}
    if recipe.learns and (last := run.last_round(recipe.learns)) > 1:
        settings = {"kind": recipe.learns, "round": last}
        found[f"{recipe.learns}_{last}"] = EvaluatedPolicy.model_validate(settings)
    return found


def rivals(recipe: Recipe, run: RunDir, settings: Evaluation, queries: Sequence[Row]) -> list[Rival]:
    """The policies of an evaluation, the first of which the others are compared with.

    Args:
        queries: of all sets; a file of prompts has one for each.

    Raises:
        LoopError: one of them is not trained yet, or cannot be sampled.
        SetError: a file of prompts does not fit the queries.
    """
    policies = settings.policies or default_policies(recipe, run)
    for key, against in settings.bases().items():
        if against not in policies:
            raise LoopError(f"evaluate.{key}.against: no policy {against!r}, but {', '.join(policies)}")
    return [_rival(name, policy, recipe, run, queries) for name, policy in policies.items()]


def _rival(
    name: str, settings: EvaluatedPolicy, recipe: Recipe, run: RunDir, queries: Sequence[Row]
) -> Rival:
    kind, prompts, start = settings.kind, None, None
    if kind == "query":
        prompts = {row["query_id"]: row["query"] for row in queries}
        identity = content_id("policy", "query", digits=16)
    elif kind == "file":
        assert settings.path is not None
        try:
            prompts = prompts_of_file(settings.path, queries)
        except SetError as error:
            raise SetError(f"evaluate.policies.{name}: {error}") from None
        identity = content_id("policy", "file", sorted(prompts.items()), digits=16)
    elif kind in ("few_shot", "endpoint"):
        identity = _of_llm(settings, recipe)
    else:
        start = _trained(name, settings, recipe, run)
        identity = start.identity
    return Rival(name, settings, identity, start, prompts)


def _of_llm(settings: EvaluatedPolicy, recipe: Recipe) -> str:
    """The identity of a policy that is an LLM with its wording and examples."""
    draft = recipe.draft
    llm = settings.llm or (draft.llm if draft is not None and draft.llm is not None else recipe.judge)
    asked = result_keys(settings.model_dump(exclude={"llm", "prompt", "examples", "times"}))
    model = result_keys(llm.model_dump(include=set(ChatModel.model_fields)))
    template = settings.prompt or ("builtin:draft" if settings.kind == "few_shot" else None)
    parts: list[Any] = [asked, model, read_prompt(template) if template is not None else None]
    if settings.kind == "few_shot":
        path = settings.examples or (draft.examples if draft is not None else None)
        assert path is not None, "see Recipe"
        parts.append([[row["query"], row["prompt"]] for row in sft_rows(path, "examples")])
    return content_id("policy", *parts, digits=16)


def _trained(name: str, settings: EvaluatedPolicy, recipe: Recipe, run: RunDir) -> Start:
    if settings.kind == "base":
        bare = recipe.model_copy(update={"sft": None})
        return Start(locate(recipe.policy.model), policy_id(bare, run))
    if settings.kind == "checkpoint":
        place = locate(str(settings.path))
        return Start(place, content_id("checkpoint", model_identity(place, None), digits=16))
    if settings.kind == "sft":
        if recipe.sft is None:
            raise LoopError(f"evaluate.policies.{name}: the recipe has no sft section")
        return Start(_there(run, "sft"), policy_id(recipe, run))
    kind = settings.kind
    if recipe.learning is None or recipe.learns != kind:
        raise LoopError(f"evaluate.policies.{name}: the recipe has no {kind} section")
    if recipe.learning.lora is not None and not recipe.learning.lora.merge:
        raise LoopError(
            f"vpo evaluate needs {kind}.lora.merge true: candidates are sampled from a whole model"
        )
    of = run if settings.round is None else RunDir(run.at(f"rounds/{settings.round}"))
    if recipe.sft is not None and settings.round is None:
        _there(run, "sft")
    checkpoint = _there(of, kind)
    return Start(checkpoint, learnt_id(recipe, of, starting_policy(recipe, of)))


def _there(run: RunDir, phase: str) -> str:
    if not run.exists(f"checkpoints/{phase}/vpo.json"):
        raise LoopError(f"{run.at(f'checkpoints/{phase}')} is not there: train first (`vpo {phase}`)")
    return run.at(f"checkpoints/{phase}")


def prompts_of(
    rival: Rival,
    recipe: Recipe,
    run: RunDir,
    queries: Sequence[Row],
    seed: int,
    retry_errors: bool,
    stop: threading.Event | None = None,
) -> dict[str, Row]:
    """What a policy makes of each query.

    Args:
        seed: number of the sampling seed; see `seeded`.
        stop: see `pipeline.generate`.

    Returns:
        By query id: `prompt`, or `error` and `error_stage`.

    Raises:
        PlacementError, GenerationError: see `pipeline.generate`.
    """
    if rival.prompts is not None:
        return {
            row["query_id"]: {"prompt": rival.prompts[row["query_id"]], "error": None, "error_stage": None}
            for row in queries
        }
    # Of each query: what was asked last, and what became of it.
    found: dict[str, Row] = {
        row["query_id"]: {"prompt": row["query"], "error": None, "error_stage": None} for row in queries
    }
    of = {row["query_id"]: row for row in queries}

    def key(query: str, row: Row, time: int) -> str:
        """What a query is known by: after the first time it is another text with the same image."""
        image = of[query].get("image")
        return query_id(row["prompt"], image and image_hash(image)) if time > 1 else query

    for time in range(1, rival.settings.times + 1):
        asked = {
            key(query, row, time): (row["prompt"], of[query])
            for query, row in found.items()
            if row["error"] is None
        }
        entering = [
            {"query_id": known, "query": text, "image": q.get("image"), "unsafe": q["unsafe"], "split": "dpo"}
            for known, (text, q) in sorted(asked.items(), key=lambda item: item[0])
        ]
        answers = _sampled(rival, recipe, run, entering, (time, seed), retry_errors, stop)
        found = {
            query: row if row["error"] is not None else answers[key(query, row, time)]
            for query, row in found.items()
        }
    return found


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with one of `evaluate.seeds`; the first is the recipe's own."""
    return recipe.model_copy(update={"seed": seed_of("evaluation", recipe.seed, seed)}) if seed else recipe


def _sampled(
    rival: Rival,
    recipe: Recipe,
    run: RunDir,
    queries: Sequence[Row],
    which: tuple[int, int],
    retry_errors: bool,
    stop: threading.Event | None,
) -> dict[str, Row]:
    time, seed = which
    name = rival.identity if which == (1, 0) else content_id(rival.identity, *which, digits=16)
    asked = Evaluation.model_validate({"policies": {rival.name: rival.settings}})
    profiles = asked_alone(recipe.profiles, None if recipe.evaluate is None else recipe.evaluate.profile)
    if profiles:
        name = content_id(
            name, {key: value.model_dump(mode="json") for key, value in profiles.items()}, digits=16
        )
    own = seeded(recipe, seed).model_copy(
        update={
            "out": run.at(f"evaluation/policy-{name}"),
            "sample": recipe.sample.model_copy(update={"k": 1}),
            "profiles": profiles,
            "evaluate": None if rival.start is not None else asked,
        }
    )
    logger.info("evaluate: prompts of %s%s", rival.name, f", time {time}" if time > 1 else "")
    if rival.start is None:
        stage, table, models = "rewrite", "rewrites", Models("", rival.identity)
    else:
        stage, table, models = "sample", "candidates", Models(rival.start.policy, rival.start.identity)
    folder = through(own, run, (stage,), queries, retry_errors, models, rival.start, stop)
    columns = ["query_id", "prompt", "error", "error_stage"]
    return {row["query_id"]: row for row in folder.table(table).rows(columns)}
