"""Whether the models of a recipe take the images of its queries, as far as their files here say it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpo_ray.prompts.image_places import why_untrained
from vpo_ray.recipe import ChatModel, Recipe, Render

# A pipeline that takes an image or none.
_EITHER = ("LTXConditionPipeline",)


# Keys of a model's configuration that tell of eyes.
_EYES = ("vision_config", "img_processor", "visual", "vision_tower", "mm_vision_tower")


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
    if not has_images:
        return
    policy = recipe.policy
    if policy.images == "show":
        yield from _blind("policy", policy.model)
        config = _config(policy.model)
        if config and not _is_blind(policy.model) and (recipe.sft is not None or recipe.learning is not None):
            why = why_untrained(policy.model, config.get("model_type"))
            yield from [f"policy.model: {why}"] if why else []
    for key, llm in llms.items():
        if llm.images == "show" and llm.backend == "vllm":
            yield from _blind(key, llm.model)


def _blind(key: str, model: str) -> Iterator[str]:
    if _is_blind(model):
        yield (
            f"{key}.model cannot see images: {model} has no vision_config in its config.json; name a "
            f"vision-language model, or write {key}.images: ignore, and it reads the text alone"
        )


def _is_blind(model: str) -> bool:
    """Whether a model here says that it has no eyes."""
    config = _config(model)
    return config is not None and not any(config.get(key) for key in _EYES)


def _config(model: str) -> dict[str, Any] | None:
    """The configuration of a model here."""
    try:
        config = json.loads(Path(model, "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # said elsewhere, or not here
    return config if isinstance(config, dict) else None


def _render(key: str, render: Render, has_images: bool) -> Iterator[str]:
    if render.kind == "openai" and has_images:
        yield f"{key}.kind: openai sends no image to a service; leave out queries.image_column"
    pipeline = _pipeline(render)
    if pipeline is None or pipeline in _EITHER:
        return
    needs = "ImageToVideo" in pipeline
    if has_images and not needs:
        yield (
            f"{key}.model: {render.model} is a {pipeline}, which takes no image, and queries.image_column "
            "gives queries one: name an image-to-video checkpoint, or leave out queries.image_column"
        )
    if needs and not has_images:
        yield (
            f"{key}.model: {render.model} is a {pipeline}, which needs an image of every query: name their "
            "column with queries.image_column, or a text-to-video checkpoint"
        )


def _pipeline(render: Render) -> str | None:
    """The pipeline's class that a checkpoint here names."""
    if render.kind != "diffusers":
        return None
    try:
        index = json.loads(Path(render.model, "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # said elsewhere, or not here
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None
