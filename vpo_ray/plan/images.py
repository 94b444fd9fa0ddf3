"""Whether the models of a recipe take the images of its queries, as far as their files here say it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpo_ray.engines.chat.eyes import has_eyes
from vpo_ray.engines.video.image_need import image_need, pipeline_of
from vpo_ray.prompts.image_places import why_untrained
from vpo_ray.recipe import ChatModel, EvaluatedSet, Recipe, Render


def image_problems(recipe: Recipe, llms: Mapping[str, ChatModel]) -> Iterator[str]:
    """A line for each model that cannot do with the recipe's queries, with an image or without.

    Args:
        llms: those beside the policy, by the recipe's key.
    """
    has_images = recipe.queries.image_column is not None
    renders = {"render": recipe.render}
    if recipe.evaluate is not None:
        renders |= {f"evaluate.transfer.{name}": one for name, one in recipe.evaluate.transfer.items()}
    for key, render in renders.items():
        yield from _render(key, render, has_images)
        if recipe.evaluate is not None and recipe.evaluate.videos:
            yield from (
                line for name, entry in _files(recipe).items() for line in _set(name, entry, key, render)
            )
    policy = recipe.policy
    if not has_images:
        if any(entry.image_column is not None for entry in _files(recipe).values()):
            seeing = {
                key: llm.model for key, llm in llms.items() if llm.backend == "vllm" and llm.images == "show"
            }
            seeing |= {"policy": policy.model} if policy.images == "show" else {}
            for key, model in sorted(seeing.items(), reverse=True):
                yield from _blind(key, model)
        return
    if policy.images == "show":
        yield from _blind("policy", policy.model)
        config = _config(policy.model)
        if config and not _is_blind(policy.model) and (recipe.sft is not None or recipe.learning is not None):
            why = why_untrained(policy.model, config.get("model_type"))
            yield from [f"policy.model: {why}"] if why else []
    for key, llm in llms.items():
        if llm.images == "show" and llm.backend == "vllm":
            yield from _blind(key, llm.model)


def _files(recipe: Recipe) -> dict[str, EvaluatedSet]:
    """The sets of an evaluation that are files of the user's, by their keys."""
    sets = recipe.evaluate.sets if recipe.evaluate is not None else {}
    return {f"evaluate.sets.{name}": entry for name, entry in sets.items() if entry.kind == "file"}


def _blind(key: str, model: str) -> Iterator[str]:
    if _is_blind(model):
        yield (
            f"{key}.model cannot see images: {model} has no vision_config in its config.json; name a "
            f"vision-language model, or write {key}.images: ignore, and it reads the text alone"
        )


def _is_blind(model: str) -> bool:
    """Whether a model here says that it has no eyes."""
    config = _config(model)
    return config is not None and not has_eyes(config)


def _config(model: str) -> dict[str, Any] | None:
    """The configuration of a model here."""
    try:
        config = json.loads(Path(model, "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # said elsewhere, or not here
    return config if isinstance(config, dict) else None


def _set(name: str, entry: EvaluatedSet, key: str, render: Render) -> Iterator[str]:
    need, has_images = image_need(render), entry.image_column is not None
    if has_images and need == "none":
        yield f"{name}.image_column: {key}.model makes videos from text alone; leave it out"
    if need == "required" and not has_images:
        yield f"{name}: {key}.model needs an image of every query: name their column with image_column"


def _render(key: str, render: Render, has_images: bool) -> Iterator[str]:
    need, pipeline = image_need(render), pipeline_of(render)
    if has_images and need == "none" and pipeline is not None:
        yield (
            f"{key}.model: {render.model} is a {pipeline}, which takes no image, and queries.image_column "
            "gives queries one: name an image-to-video checkpoint, or leave out queries.image_column"
        )
    if need == "required" and not has_images:
        yield (
            f"{key}.model: {render.model} is a {pipeline}, which needs an image of every query: name their "
            "column with queries.image_column, or a text-to-video checkpoint"
        )
