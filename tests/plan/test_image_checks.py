"""A recipe whose models cannot do with its queries' images is refused before it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from vpo_ray.plan import PlanError, check_recipe


@pytest.fixture
def image_video(tmp_path: Path) -> str:
    """What the plan looks at of an image-to-video checkpoint."""
    folder = tmp_path / "image_video"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    (folder / "vae/w.safetensors").write_text("")
    return str(folder)


def problems(tiny: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        check_recipe(recipe(tiny, **changes))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_video_model_takes_what_queries_have(tiny: dict[str, Any], image_video: str) -> None:
    (found,) = problems(tiny, queries__image_column="image")
    assert "is a CogVideoXPipeline, which takes no image, and queries.image_column" in found
    (found,) = problems(tiny, render__model=image_video)
    assert "is a WanImageToVideoPipeline, which needs an image of every query" in found
    check_recipe(recipe(tiny, queries__image_column="image", render__model=image_video))
