"""A recipe whose models cannot do with its queries' images is refused before it runs."""

import json
import shutil
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
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}), "utf-8")
    (folder / "vae/w.safetensors").write_text("", "utf-8")
    return str(folder)


BLIND = {"policy__images": "ignore", "judge__images": "ignore"}


def problems(tiny: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        check_recipe(recipe(tiny, **changes))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_video_model_takes_what_queries_have(tiny: dict[str, Any], image_video: str) -> None:
    (found,) = problems(tiny, queries__image_column="image", **BLIND)
    assert "is a CogVideoXPipeline, which takes no image, and queries.image_column" in found
    (found,) = problems(tiny, render__model=image_video)
    assert "is a WanImageToVideoPipeline, which needs an image of every query" in found
    check_recipe(recipe(tiny, queries__image_column="image", render__model=image_video, **BLIND))


def test_a_video_service_is_sent_images(tiny: dict[str, Any]) -> None:
    service = json.dumps(
        {"kind": "openai", "model": "wan", "endpoint": {"base_url": "http://wan.example/v1"}}
    )
    del tiny["render.model"]
    for images in ({"queries__image_column": "image"}, {}):
        check_recipe(recipe(tiny, render=service, **images, **BLIND))


def test_a_model_sees_images_or_ignores_them(tiny: dict[str, Any], image_video: str, tmp_path: Path) -> None:
    images = {"queries__image_column": "image", "render__model": image_video}
    policy, judge = problems(tiny, **images)
    assert "policy.model cannot see images: " in policy
    assert "or write policy.images: ignore, and it reads the text alone" in policy
    assert "judge.model cannot see images: " in judge
    check_recipe(recipe(tiny, **images, policy__images="ignore", judge__images="ignore"))


@pytest.mark.parametrize("kind", ["idefics3", "qwen2_vl"])
def test_a_policy_that_sees_images_is_trained_where_packing_fits_it(
    tiny: dict[str, Any], image_video: str, tiny_models: Path, tmp_path: Path, kind: str
) -> None:
    seeing = tmp_path / "seeing"
    shutil.copytree(tiny_models / "policy", seeing)
    config = json.loads((seeing / "config.json").read_text("utf-8"))
    more = {"model_type": kind, "vision_config": {"hidden_size": 8}}
    (seeing / "config.json").write_text(json.dumps({**config, **more}), "utf-8")
    images = {"queries__image_column": "image", "render__model": image_video, "judge__images": "ignore"}
    if kind == "idefics3":
        check_recipe(recipe(tiny, **images, policy__model=seeing))
        return
    (found,) = problems(tiny, **images, policy__model=seeing)
    assert found.startswith("policy.model: ")
    assert "is of the type qwen2_vl, which is sampled with images and not trained with them" in found


def test_a_set_of_an_evaluation_has_what_the_video_model_takes(
    tiny: dict[str, Any], image_video: str, tmp_path: Path
) -> None:
    (tmp_path / "set.jsonl").write_text('{"query": "a cat", "image": "cat.png"}\n', "utf-8")
    path = {"path": str(tmp_path / "set.jsonl")}
    images = {"queries__image_column": "image", "render__model": image_video, **BLIND}
    (found,) = problems(tiny, **images, evaluate={"sets": {"mine": path}, "policies": ["query"]})
    assert "evaluate.sets.mine: render.model needs an image of every query" in found
    seen = {"sets": {"mine": {**path, "image_column": "image"}}, "policies": ["query"]}
    check_recipe(recipe(tiny, **images, evaluate=seen))
    (found,) = problems(tiny, **BLIND, evaluate=seen)
    assert "evaluate.sets.mine.image_column: render.model makes videos from text alone" in found
    policy, judge = problems(tiny, evaluate={**seen, "videos": False})
    assert "policy.model cannot see images" in policy
    assert "judge.model cannot see images" in judge
