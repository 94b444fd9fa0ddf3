"""Measures that take a model, against the definition written out frame by frame on tiny checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError, Scored, build
from vpo_ray.engines.reward.checkpoint import CheckpointError
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.engines.video.engine import encode
from vpo_ray.stages import score

TINY = Path(__file__).parents[3] / "jobs/recipes/tiny.yaml"
SIZE = 32
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STYLED = "A boat on the river, Van Gogh style"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random checkpoints in `clip`, `large` and `dino`, `head.safetensors` and `info.json`."""
    place = tmp_path_factory.mktemp("vbench")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**shape, **ends, "vocab_size": len(words), "max_position_embeddings": 16}
    for name, patch in (("clip", 8), ("large", 4)):
        vision = {**shape, "image_size": SIZE, "patch_size": patch}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        for parameter in model.parameters():  # its own beginning hardly tells images apart
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    dino = ViTModel(ViTConfig(**shape, image_size=SIZE, patch_size=8), add_pooling_layer=False)
    for parameter in dino.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    dino.save_pretrained(place / "dino")
    save_file({"weight": torch.randn(1, 24), "bias": torch.randn(1)}, place / "head.safetensors")
    entries: list[dict[str, Any]] = [
        {"prompt_en": "a dog", "dimension": ["subject_consistency"]},
        {
            "prompt_en": STYLED,
            "dimension": ["appearance_style"],
            "auxiliary_info": {"appearance_style": {"appearance_style": "Van Gogh style"}},
        },
    ]
    (place / "info.json").write_text(json.dumps(entries), "utf-8")
    return place


def reward(folder: Path, *dimensions: str) -> recipe.Reward:
    needed: dict[str, dict[str, Any]] = {
        "background_consistency": {"clip": folder / "clip"},
        "subject_consistency": {"dino": folder / "dino"},
        "aesthetic_quality": {"aesthetic": {"clip": folder / "large", "head": folder / "head.safetensors"}},
        "appearance_style": {"clip": folder / "clip", "styles": folder / "info.json"},
    }
    keys: dict[str, Any] = {k: v for name in dimensions for k, v in needed.get(name, {}).items()}
    texts = json.loads(json.dumps(keys, default=str))
    return recipe.Reward.model_validate(
        {"kind": "vbench", "dimensions": dimensions, "device": "cpu", **texts}
    )


MODELS = ("subject_consistency", "appearance_style", "background_consistency", "aesthetic_quality")


def measured(settings: recipe.Reward, video: bytes, query: str = STYLED) -> dict[str, float]:
    (result,) = build(settings).score([video], [query])
    assert isinstance(result, Scored), result
    return result.dimensions


def pixels(frame: np.ndarray, kind: int, values: tuple[tuple[float, ...], ...], crop: bool) -> torch.Tensor:
    """By OpenCV, which neither rounds nor clamps a float."""
    height, width = frame.shape[:2]
    short = min(height, width)
    size = (int(SIZE * width / short), int(SIZE * height / short))
    found = cv2.resize(frame.astype(np.float32), size, interpolation=kind)
    return normalised(found, values, crop)


def normalised(image: np.ndarray, values: tuple[tuple[float, ...], ...], crop: bool) -> torch.Tensor:
    if crop:
        top, left = (round((side - SIZE) / 2) for side in image.shape[:2])
        image = image[top : top + SIZE, left : left + SIZE]
    mean, std = (np.array(value, np.float32) for value in values)
    return torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1)[None].float()


def alike(features: list[torch.Tensor]) -> float:
    found = []
    for i in range(1, len(features)):
        before = torch.cosine_similarity(features[i - 1], features[i]).item()
        first = torch.cosine_similarity(features[0], features[i]).item()
        found.append((max(0.0, before) + max(0.0, first)) / 2)
    return sum(found) / len(found)


@torch.inference_mode()
def expected(folder: Path, frames: np.ndarray, style: str) -> dict[str, float]:
    clip, large = (CLIPModel.from_pretrained(folder / name).eval() for name in ("clip", "large"))
    dino = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).eval()
    text = CLIPTokenizer.from_pretrained(folder / "clip")([style], return_tensors="pt")
    cubic = [pixels(frame, cv2.INTER_CUBIC, CLIP, True) for frame in frames]
    background = [clip.get_image_features(pixel_values=one).pooler_output for one in cubic]
    linear = [pixels(frame, cv2.INTER_LINEAR, IMAGENET, False) for frame in frames]
    subject = [dino(one, interpolate_pos_encoding=True).last_hidden_state[:, 0] for one in linear]
    from safetensors.torch import load_file

    head = load_file(folder / "head.safetensors")
    marks, logits = [], []
    for one, frame in zip(cubic, frames, strict=True):
        features = large.get_image_features(pixel_values=one).pooler_output
        marks.append((features / features.norm() @ head["weight"].T + head["bias"]).item() / 10)
        short = min(frame.shape[:2])
        size = (int(SIZE * frame.shape[1] / short), int(SIZE * frame.shape[0] / short))
        image = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
        output = clip(pixel_values=normalised(image, CLIP, True), **text)
        logits.append(output.logits_per_text[0, 0].item() / 100)
    return {
        "subject_consistency": alike(subject),
        "appearance_style": sum(logits) / len(logits),
        "background_consistency": alike(background),
        "aesthetic_quality": sum(marks) / len(marks),
    }


@pytest.mark.parametrize("shape", [(5, 64, 96), (4, 90, 58), (2, 32, 32), (34, 48, 40)])
def test_each_is_what_its_definition_gives(
    folder: Path, clip: Callable[..., bytes], shape: tuple[int, int, int]
) -> None:
    frames, height, width = shape
    video = clip(1, frames, height, width)
    found = measured(reward(folder, *MODELS), video)
    assert list(found) == list(MODELS)
    assert found == pytest.approx(expected(folder, read_video(video)[0], "Van Gogh style"), abs=1e-4)


def test_a_still_clip_is_consistent_and_a_changing_one_is_less(
    folder: Path, clip: Callable[..., bytes]
) -> None:
    settings = reward(folder, "background_consistency", "subject_consistency")
    still = encode(read_video(clip(0, frames=1))[0].repeat(5, 0), 8, 0)
    assert measured(settings, still) == pytest.approx(dict.fromkeys(settings.dimensions, 1.0), abs=1e-2)
    changing = measured(settings, clip(0))
    assert all(changing[name] < 0.99 for name in settings.dimensions)


def test_one_frame_has_a_look_but_no_consistency(folder: Path, clip: Callable[..., bytes]) -> None:
    one = clip(0, frames=1)
    assert measured(reward(folder, "aesthetic_quality", "appearance_style"), one)
    (result,) = build(reward(folder, "background_consistency")).score([one], ["q"])
    assert isinstance(result, RewardError)


def test_results_do_not_depend_on_the_batch(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(reward(folder, *MODELS))
    videos = [clip(0), b"broken", clip(1, 3, 48, 48)]
    together = model.score(videos, [STYLED] * 3)
    assert isinstance(together[1], RewardError)
    assert together[::2] == [model.score([video], [STYLED])[0] for video in videos[::2]]


def test_a_query_that_vbench_has_no_style_of_has_no_such_dimension(
    folder: Path, clip: Callable[..., bytes]
) -> None:
    found = measured(reward(folder, "temporal_flickering", "appearance_style"), clip(0), "a dog")
    assert list(found) == ["temporal_flickering"]
    (result,) = build(reward(folder, "appearance_style")).score([clip(0)], ["a dog"])
    assert isinstance(result, RewardError)


def test_what_a_measure_is_made_with_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files travel with `vpo submit`, are found on every node, and others of the same name are not mixed."""
    monkeypatch.chdir(folder)
    settings = reward(Path(), *MODELS, "motion_magnitude")
    places = {
        "clip": "clip", "dino": "dino", "styles": "info.json",
        "aesthetic.clip": "large", "aesthetic.head": "head.safetensors",
    }  # fmt: skip
    assert dict(recipe.sources(settings)) == places
    assert dict(recipe.sources(settings.located())) == {k: str(folder / name) for k, name in places.items()}
    assert build(settings.located())
    given = recipe.load(TINY).model_copy(update={"reward": settings, "more_rewards": {}})
    before = dict(score.facts(given))
    assert before.keys() == {f"reward.{key}" for key in places} | {
        "torch", "transformers", "opencv-python-headless",
    }  # fmt: skip
    text = (folder / "info.json").read_text("utf-8")
    try:
        (folder / "info.json").write_text("[]", "utf-8")
        after = dict(score.facts(given))
    finally:
        (folder / "info.json").write_text(text, "utf-8")
    assert {key for key in before if before[key] != after[key]} == {"reward.styles"}


def test_what_is_no_such_model_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(*dimensions: str, **keys: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            build(reward(folder, *dimensions).model_copy(update=keys))
        return str(caught.value)

    assert "reward.clip: " in refused("background_consistency", clip=str(folder / "dino"))
    assert "type vit, not clip" in refused("background_consistency", clip=str(folder / "dino"))
    assert "reward.dino: " in refused("subject_consistency", dino=str(tmp_path / "none"))
    head = tmp_path / "head.pth"
    torch.save({"weight": torch.zeros(1, 24), "bias": torch.zeros(1)}, head)
    large = str(folder / "large")
    said = refused("aesthetic_quality", aesthetic=recipe.video.Aesthetic(clip=large, head=str(head)))
    assert "safetensors.torch.save_file" in said
    save_file({"weight": torch.zeros(1, 7)}, tmp_path / "head.safetensors")
    wide = recipe.video.Aesthetic(clip=large, head=str(tmp_path / "head.safetensors"))
    assert "weight (1, 24)" in refused("aesthetic_quality", aesthetic=wide)
    (tmp_path / "info.json").write_text('{"a": 1}', "utf-8")
    assert "VBench_full_info" in refused("appearance_style", styles=str(tmp_path / "info.json"))
