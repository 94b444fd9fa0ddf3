"""LAION's aesthetic predictors against their definition, by stock CLIP, its stock processor and numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError, Scored, build
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.engines.reward.image_features import clip_pixels
from vpo_ray.recipe.plugins import PluginError, find
from vpo_ray.world.tiny_scorers import make_tiny_clip, make_tiny_heads

SIZE = 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("laion")
    make_tiny_clip(place / "clip", "quick_gelu")
    make_tiny_clip(place / "gelu", "gelu")
    make_tiny_heads(place)
    return place


def settings(folder: Path, variant: str, head: str | None = None, clip: str = "clip") -> recipe.Reward:
    options = {"clip": f"{folder}/{clip}", "head": f"{folder}/{head or variant}.safetensors"}
    return recipe.Reward(kind="laion_aesthetic", options={**options, "variant": variant}, device="cpu")


def four(count: int) -> list[int]:
    """The frames that Prompt-A-Video's scorers see."""
    return [int(i) for i in np.arange(0, count, count / 4)]


def pixels(frame: np.ndarray) -> torch.Tensor:
    """Pillow's resize and torchvision's centre crop."""
    height, width = frame.shape[:2]
    short = min(height, width)
    image = Image.fromarray(frame).resize(
        (SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC
    )
    left, top = (round((side - SIZE) / 2) for side in image.size)
    array = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    return torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


@torch.inference_mode()
def expected(folder: Path, frames: np.ndarray, variant: str, trap: str = "") -> float:
    clip = CLIPModel.from_pretrained(folder / ("gelu" if trap == "gelu" else "clip")).eval()
    chosen = np.linspace(0, len(frames) - 1, 4).astype(int) if trap == "last frame too" else four(len(frames))
    batch = torch.stack([pixels(frames[i]) for i in chosen])
    if trap == "without antialias":
        batch = clip_pixels(torch.from_numpy(frames[chosen]), SIZE)
    features = clip.get_image_features(pixel_values=batch).pooler_output
    if trap != "any length":
        features = features / features.norm(dim=-1, keepdim=True)
    head = load_file(folder / f"{variant}.safetensors")
    if variant == "v1":
        return float((features @ head["weight"].T + head["bias"]).mean())
    for number in (0, 2, 4, 6, 7):
        features = features @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
        if trap == "activations":
            features = features.relu()
    return float(features.mean())


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("shape", [(9, 64, 96), (49, 104, 56), (2, 72, 72), (1, 32, 40)])
def test_it_is_what_the_definition_gives(
    folder: Path, clip: Callable[..., bytes], variant: str, shape: tuple[int, int, int]
) -> None:
    count, height, width = shape
    video = clip(2, count, height, width)
    (found,) = build(settings(folder, variant)).score([video], ["a cat"])
    assert isinstance(found, Scored), found
    assert list(found.dimensions) == ["aesthetic"]
    assert found.score == found.dimensions["aesthetic"]
    assert found.score == pytest.approx(expected(folder, read_video(video)[0], variant), abs=2e-5)


TRAPS = ["gelu", "last frame too", "without antialias", "any length"]


@pytest.mark.parametrize(("variant", "trap"), [*(("v1", trap) for trap in TRAPS), ("v2", "activations")])
def test_each_trap_gives_another_mark(
    folder: Path, clip: Callable[..., bytes], variant: str, trap: str
) -> None:
    video = clip(2)
    frames = read_video(video)[0]
    assert abs(expected(folder, frames, variant, trap) - expected(folder, frames, variant)) > 1e-3


def test_a_video_that_cannot_be_read_is_an_error_of_its_own(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(settings(folder, "v1"))
    first, bad, last = model.score([clip(1), b"no video", clip(3)], ["a", "b", "c"])
    assert isinstance(bad, RewardError)
    assert isinstance(first, Scored)
    assert [last] == model.score([clip(3)], ["c"])


@pytest.mark.parametrize(
    ("variant", "head", "clip", "says"),
    [
        ("v1", "v2", "clip", "v2.safetensors has .*; V1 on features of 48 has"),
        ("v2", "v1", "clip", "v1.safetensors has bias, weight; V2 has layers.0.weight"),
        ("v1", "v1", "gelu", "computes with gelu, and the predictor was trained on .* quick_gelu"),
        (
            "v1",
            "absent",
            "clip",
            "options.head: .*absent.safetensors is no safetensors file .*vpo convert-reward",
        ),
    ],
)
def test_what_it_was_not_trained_on_is_refused(
    folder: Path, variant: str, head: str, clip: str, says: str
) -> None:
    with pytest.raises(PluginError, match=says):
        build(settings(folder, variant, head, clip))


def test_its_identity_is_of_content(folder: Path, tmp_path: Path) -> None:
    one = settings(folder, "v1")
    same = find(one).identity(one)
    (tmp_path / "moved.safetensors").write_bytes((folder / "v1.safetensors").read_bytes())
    moved = one.model_copy(update={"options": {**one.options, "head": f"{tmp_path}/moved.safetensors"}})
    assert find(moved).identity(moved) == same
    other = settings(folder, "v2")
    assert find(other).identity(other) != same
    (tmp_path / "moved.safetensors").write_bytes((folder / "v2.safetensors").read_bytes())
    assert find(moved).identity(moved) != same
