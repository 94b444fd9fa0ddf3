"""A pipeline's weights are all there, or it is refused: a missing one would be noise in every video."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from vpo_ray.engines.video.components import only_variant
from vpo_ray.engines.video.model import load_pipeline
from vpo_ray.engines.video.weights import VideoModelError
from vpo_ray.recipe import Render

TRANSFORMER, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def video(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "video", tmp_path / "video"))


def loaded(folder: Path) -> Any:
    size = {"frames": 9, "height": 32, "width": 48}
    return load_pipeline(Render(model=str(folder), dtype="float32", steps=1, **size))


def change(path: Path, made: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(made(load_file(path)), path, metadata={"format": "pt"})


def without_one(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def prefixed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.engine
@pytest.mark.parametrize("file", [TRANSFORMER, VAE, ENCODER])
@pytest.mark.parametrize("made", [without_one, prefixed])
def test_a_component_without_some_of_its_weights_is_refused(
    file: str, made: Callable[[dict[str, Any]], dict[str, Any]], video: Path
) -> None:
    change(video / file, made)
    says = rf"the weights of its {Path(file).parent} are not those of its config.json: \d+ are missing"
    with pytest.raises(VideoModelError, match=says):
        loaded(video)


@pytest.mark.engine
def test_an_index_that_lists_nothing_is_refused(video: Path) -> None:
    (video / "model_index.json").write_text("[]", "utf-8")
    with pytest.raises(VideoModelError, match=r"its model_index\.json is no object"):
        loaded(video)


@pytest.mark.engine
@pytest.mark.parametrize("files", [[TRANSFORMER], [TRANSFORMER, VAE, ENCODER]])
def test_components_that_are_there_in_half_precision_alone_are_loaded(files: list[str], video: Path) -> None:
    plain = loaded(video)
    for file in files:
        (video / file).rename((video / file).with_suffix(".fp16.safetensors"))
    found = loaded(video)
    for part in ("transformer", "vae", "text_encoder"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (plain, found))
        assert all((before[name] == after[name]).all() for name in before)


def test_a_variant_is_taken_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    for name in ("transformer", "text_encoder"):
        (tmp_path / name).mkdir()
    assert only_variant(str(tmp_path)) is None
    assert only_variant("org/of-a-hub") is None
    (tmp_path / "text_encoder/model.safetensors").touch()
    (tmp_path / "text_encoder/model.fp16.safetensors").touch()
    assert only_variant(str(tmp_path)) is None
    (tmp_path / "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
    assert only_variant(str(tmp_path)) == "fp16"
    (tmp_path / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    assert only_variant(str(tmp_path)) is None
