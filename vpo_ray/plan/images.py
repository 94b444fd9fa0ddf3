"""Whether the models of a recipe take the images of its queries, as far as their files here say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vpo_ray.recipe import Recipe, Render

# A pipeline that takes an image or none.
_EITHER = ("LTXConditionPipeline",)


def image_problems(recipe: Recipe) -> Iterator[str]:
    """A line for each model that cannot do with the recipe's queries, with an image or without."""
    has_images = recipe.queries.image_column is not None
    renders = {"render": recipe.render}
    if recipe.evaluate is not None:
        renders |= {f"evaluate.transfer.{name}": one for name, one in recipe.evaluate.transfer.items()}
    for key, render in renders.items():
        yield from _render(key, render, has_images)


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
