"""Verdicts, videos and scores of prompts, whoever made them.

All policies share the run directories here, so that each model is loaded once and a prompt that two of them
make is judged and rendered once:

    evaluation/judged-<id>   candidates ─► judge ─► verdicts
    evaluation/videos-<id>   verdicts ─► render ─► score ─► feedback, of one video model and seed

A prompt is rendered whatever its verdict, which is in the first: for the second all count as aligned, as the
render stage takes no others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from vpo_ray.evaluation.policies import seeded
from vpo_ray.loop.streams import through
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Evaluation, Recipe, Render, Reward
from vpo_ray.records import Row, content_id
from vpo_ray.stages.profiles import asked_alone
from vpo_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)

# What every policy's prompt of a query is known by.
Key = tuple[str, str]  # query id, prompt


def prompt_id(key: Key) -> str:
    return content_id("evaluated", *key)


def verdicts(
    recipe: Recipe, run: RunDir, settings: Evaluation, prompts: Mapping[Key, Row], retry_errors: bool
) -> dict[str, Row]:
    """The judge's rows of prompts, by `prompt_id`: `verdict`, `critique`, `error`.

    Args:
        prompts: the query of each.

    Raises:
        PlacementError, GenerationError: see `pipeline.generate`.
    """
    judge = (settings.judge or recipe.judge).without_refining()
    own = recipe.model_copy(update={"judge": judge, "evaluate": None})
    under = asked_alone(recipe.profiles, settings.profile)
    profile = {name: profile.model_dump(mode="json") for name, profile in under.items()}
    parts = [own.fingerprint("judge"), read_prompt(judge.critique_prompt), recipe.seed]
    name = content_id(*parts, *([profile] if profile else []), digits=16)
    own = own.model_copy(update={"out": run.at(f"evaluation/judged-{name}")})
    columns = ["candidate_id", "verdict", "critique", "error", "error_stage"]
    logger.info("evaluate: verdicts on %d prompts", len(prompts))
    rows = ({**row, **_conditions(prompts[row["query_id"], row["prompt"]])} for row in _rows(prompts))
    folder = through(own, run, ("judge",), rows, retry_errors)
    return {row["candidate_id"]: row for row in folder.table("verdicts").rows(columns)}


def videos(
    recipe: Recipe,
    run: RunDir,
    render: Render,
    rewards: Mapping[str, Reward],
    prompts: Mapping[Key, Row],
    seed: int,
    retry_errors: bool,
) -> dict[str, Row]:
    """The rows of prompts with their videos and scores, by `prompt_id`.

    Args:
        rewards: measures beside the recipe's own rewards.
        seed: number of the video seed.

    Raises:
        PlacementError, GenerationError: see `pipeline.generate`.
    """
    own = seeded(recipe, seed).model_copy(
        update={
            "gate": None,
            "render": in_full(render, recipe, run),
            "more_rewards": {**recipe.more_rewards, **rewards},
            "evaluate": None,
        }
    )
    name = content_id(own.fingerprint("render", "reward", "more_rewards"), own.seed, digits=16)
    own = own.model_copy(update={"out": run.at(f"evaluation/videos-{name}")})
    logger.info("evaluate: videos of %d prompts by %s", len(prompts), render.model or render.kind)
    rows = ({**row, "verdict": "aligned"} for row in _rows(prompts))
    folder = through(own, run, ("render", "score"), rows, retry_errors)
    return {row["candidate_id"]: row for row in folder.table("feedback").rows()}


def in_full(render: Render, recipe: Recipe, run: RunDir) -> Render:
    """The settings by which all prompts are rendered, with a video store: their own, or the run's."""
    store = render.store or recipe.render.store or run.at("videos")
    return render.model_copy(update={"store": store, "strategy": "all", "preview": None})


def _conditions(query: Row) -> Row:
    """What the judge is told that a prompt was asked to meet; whether it does is a measure, no verdict."""
    return {name: query[name] for name in ("profile", "conditions") if name in query}


def _rows(prompts: Mapping[Key, Row]) -> Iterable[Row]:
    for key, query in sorted(prompts.items(), key=lambda item: item[0]):
        yield {
            "candidate_id": prompt_id(key),
            "query_id": key[0],
            "query": query["query"],
            "image": query.get("image"),
            "unsafe": query["unsafe"],
            "k": 0,
            "seed": 0,
            "prompt": key[1],
        }
