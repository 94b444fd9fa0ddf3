"""The tiny recipe with changes, for the tests of plans."""

from pathlib import Path
from typing import Any

from vpo_ray.recipe import Recipe, load

ROOT = Path(__file__).parents[2]


def recipe(tiny: dict[str, Any], **changes: Any) -> Recipe:
    """`changes` name keys with two underscores for a dot: render__steps=7."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in {**tiny, **named}.items()]
    return load(ROOT / "jobs/recipes/tiny.yaml", overrides)
