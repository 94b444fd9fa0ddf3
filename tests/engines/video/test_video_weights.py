"""LoRA weights and quantisation of the video model, on the tiny CogVideoX pipeline."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.engines.video.model import VideoModelError
from vpo_ray.engines.video.weights import weights_identity
from vpo_ray.recipe import Lora, Render
from vpo_ray.storage.videos import video_key

pytestmark = pytest.mark.engine

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def settings(tiny_models: Path) -> dict[str, Any]:
    size = {"frames": 9, "height": 32, "width": 48}
    return {"model": str(tiny_models / "video"), "dtype": "float32", "steps": 2, **size}


@pytest.fixture(scope="module")
def lora(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of the tiny transformer that changes what it renders, saved by diffusers."""
    folder = tmp_path_factory.mktemp("lora")
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(tiny_models / "video/transformer")
    torch.manual_seed(5)
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(transformer)
    diffusers.CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def frames(settings: dict[str, Any], **options: Any) -> np.ndarray:
    (video,) = VideoEngine(Render(**settings, **options)).render(["a cat"], [1])
    assert isinstance(video, np.ndarray), video
    return video.astype(int)


def test_a_lora_is_added_to_the_weights(settings: dict[str, Any], lora: Path) -> None:
    plain = frames(settings)
    added = frames(settings, lora=Lora(path=str(lora)))
    assert np.abs(added - plain).max() > 1
    half = frames(settings, lora=Lora(path=str(lora / FILE), scale=0.5))
    assert np.abs(half - added).max() > 0
    assert np.array_equal(frames(settings, lora=Lora(path=str(lora), scale=0.0)), plain)

    # What diffusers makes of it without fusing, within a rounding of the last of 8 bits.
    engine = VideoEngine(Render(**settings))
    engine.pipeline.load_lora_weights(str(lora))
    (beside,) = engine.render(["a cat"], [1])
    assert np.abs(beside.astype(int) - added).max() <= 1


def test_a_lora_decides_the_key_by_its_content(settings: dict[str, Any], lora: Path, tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        render = Render(**settings, **options)
        return video_key(render, "a cat", 1, weights_identity(render))

    moved = shutil.copytree(lora, tmp_path / "moved")
    keys = [key(), key(lora=Lora(path=str(lora))), key(lora=Lora(path=str(lora), scale=0.5))]
    assert key(lora=Lora(path=str(moved / FILE))) == keys[1]
    weights = load_file(moved / FILE)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / FILE)
    keys.append(key(lora=Lora(path=str(moved))))
    assert len(set(keys)) == 4


def _renamed(folder: Path) -> None:
    weights = load_file(folder / FILE)
    save_file({name.replace("to_q", "to_query"): w for name, w in weights.items()}, folder / FILE)


def _without_component(folder: Path) -> None:
    weights = load_file(folder / FILE)
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, folder / FILE)


def _of_another_width(folder: Path) -> None:
    weights = load_file(folder / FILE)
    wider = {name: w.repeat(1, 2) if "lora_A" in name else w.repeat(2, 1) for name, w in weights.items()}
    save_file(wider, folder / FILE)


def _with_two_files(folder: Path) -> None:
    shutil.copy(folder / FILE, folder / "other.safetensors")


def _without_a_file(folder: Path) -> None:
    (folder / FILE).unlink()


def _cut_short(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_renamed, r"is for another model: CogVideoXPipeline has no .*attn1\.to_query"),
        (_without_component, "is for another model: CogVideoXPipeline has no transformer_blocks"),
        (_of_another_width, "cannot be added to CogVideoXPipeline"),
        (_with_two_files, "holds 2 safetensors files; name one with render.lora.weight_name"),
        (_without_a_file, "holds 0 safetensors files"),
        (_cut_short, "cannot be added to CogVideoXPipeline"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    settings: dict[str, Any], lora: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    folder = shutil.copytree(lora, tmp_path / "lora")
    damage(folder)
    with pytest.raises(VideoModelError, match=r"render\.lora: ") as refusal:
        VideoEngine(Render(**settings, lora=Lora(path=str(folder))))
    assert refusal.match(says)


def test_a_lora_that_is_not_there_is_refused(settings: dict[str, Any], lora: Path) -> None:
    for path in ("runs/no/such/lora", str(lora.parent)):
        with pytest.raises(VideoModelError, match=r"render\.lora: "):
            weights_identity(Render(**settings, lora=Lora(path=path)))
    pickled = lora / "weights.bin"
    pickled.touch()
    with pytest.raises(VideoModelError, match="no safetensors file"):
        weights_identity(Render(**settings, lora=Lora(path=str(pickled))))


@pytest.mark.parametrize("name", ["int8_weight_only", "int8_dynamic", "float8_weight_only"])
def test_weights_are_kept_in_8_bits(settings: dict[str, Any], name: str) -> None:
    plain = frames(settings)
    engine = VideoEngine(Render(**settings, quantize=name))
    layer = engine.pipeline.transformer.transformer_blocks[0].attn1.to_q
    assert layer.weight.qdata.element_size() == 1
    (video,) = engine.render(["a cat"], [1])
    assert isinstance(video, np.ndarray), video
    # 8 bits move pixels, but the video stays the same one.
    assert 0 < np.abs(video.astype(int) - plain).mean() < 10


def test_a_lora_is_added_before_quantisation(settings: dict[str, Any], lora: Path) -> None:
    added = frames(settings, lora=Lora(path=str(lora)))
    both = frames(settings, lora=Lora(path=str(lora)), quantize="int8_weight_only")
    plain = frames(settings)
    assert np.abs(both - added).mean() < np.abs(added - plain).mean()


def test_quantisation_that_the_device_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        VideoModelError, match=r"render\.quantize=float8_dynamic: .* cannot be quantised on cpu"
    ):
        VideoEngine(Render(**settings, quantize="float8_dynamic", device="cpu"))


def test_quantisation_without_torchao_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(VideoModelError, match=r"render\.quantize=int8_weight_only needs torchao"):
        VideoEngine(Render(**settings, quantize="int8_weight_only"))


def test_an_installed_torchao_says_nothing_at_import() -> None:
    code = "import vpo_ray.engines, torchao.quantization, diffusers; diffusers.CogVideoXPipeline"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
