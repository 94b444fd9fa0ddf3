"""Whether a video model takes an image with a prompt, as far as its files say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from vpo_ray.recipe import Render

ImageNeed = Literal["none", "optional", "required"]

# Pipelines that take an image or none.
_EITHER = ("LTXConditionPipeline",)


def image_need(render: Render) -> ImageNeed | None:
    """What the checkpoint's pipeline does with images; None where the checkpoint is not here, or the model is
    a plugin's or a service's."""
    pipeline = pipeline_of(render)
    if pipeline is None:
        return None
    if pipeline in _EITHER:
        return "optional"
    return "required" if "ImageToVideo" in pipeline else "none"


def pipeline_of(render: Render) -> str | None:
    """The pipeline's class that a checkpoint here names."""
    if render.kind != "diffusers":
        return None
    try:
        index = json.loads(Path(render.model, "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else None
