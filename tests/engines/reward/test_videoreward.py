"""VideoReward against its description written down once more: plain numpy, and transformers' own model."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_videoreward import SPECIAL, TEMPLATE, save_tiny
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError, Scored, build, qwen2_vl
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.recipe import plugins
from vpo_ray.recipe.plugins import PluginError
from vpo_ray.stages import score

TINY = Path(__file__).parents[3] / "jobs/recipes/tiny.yaml"
QUERY = "A red boat, é <|im_end|> <|VQ_reward|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("videoreward"), rows=3)


def reward(folder: Path, **options: Any) -> recipe.Reward:
    return recipe.Reward.model_validate(
        {
            "kind": "videoreward",
            "model": str(folder),
            "device": "cpu",
            "dtype": "float32",
            "options": {"template": str(folder / "template.txt"), **options},
        }
    )


def scored(settings: recipe.Reward, video: bytes, query: str = QUERY) -> Scored:
    (result,) = build(settings).score([video], [query])
    assert isinstance(result, Scored), result
    return result


# -- the description, once more


def numpy_frames(count: int, fps: float) -> list[int]:
    wanted = min(max(count / fps * 2, 4), count - count % 2)
    number = 2 * round(wanted / 2)
    return [round(i * (count - 1) / (number - 1)) for i in range(number)]


def numpy_size(height: int, width: int, most: int) -> tuple[int, int]:
    h, w = (max(28, round(side / 28) * 28) for side in (height, width))
    if h * w > most:
        ratio = math.sqrt(height * width / most)
        return int(height / ratio / 28) * 28, int(width / ratio / 28) * 28
    if h * w < 100_352:
        ratio = math.sqrt(100_352 / (height * width))
        return math.ceil(height * ratio / 28) * 28, math.ceil(width * ratio / 28) * 28
    return h, w


def weights(size: int, wanted: int) -> np.ndarray:
    """The matrix of an antialiased bicubic resize of one axis (a = -0.5)."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs((np.arange(size)[None] + 0.5 - centres[:, None]) / stretch)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    found = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return found / found.sum(1, keepdims=True)


def numpy_resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = weights(frames.shape[1], size[0]), weights(frames.shape[2], size[1])
    found = np.einsum("ah,thwc,bw->tabc", rows, frames.astype(np.float64), columns, optimize=True)
    return np.round(np.clip(found, 0, 255))


def numpy_patches(frames: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """In the order that Qwen2-VL wants: pairs of frames, squares of 2 x 2 patches, and what is in them."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (frames / 255 - mean) / std
    found = []
    times, rows, columns = len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14
    for time in range(times):
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    top, left = 14 * (row + y), 14 * (column + x)
                    cube = pixels[2 * time : 2 * time + 2, top : top + 14, left : left + 14]
                    found.append(cube.transpose(3, 0, 1, 2).ravel())
    return np.array(found), [times, rows, columns]


@torch.inference_mode()
def expected(folder: Path, video: bytes, query: str, positions: str = "sequential") -> np.ndarray:
    """The three numbers at the markers."""
    frames, fps = read_video(video)
    chosen = frames[numpy_frames(len(frames), fps)]
    patches, grid = numpy_patches(numpy_resized(chosen, numpy_size(*chosen.shape[1:3], 200_704)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * (len(patches) // 4)
        + "<|vision_end|>"
        + TEMPLATE.replace("{text_prompt}", query)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().model
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "pixel_values_videos": torch.from_numpy(patches).float(),
        "video_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).int(),
    }
    if positions == "sequential":
        inputs["position_ids"] = torch.arange(ids.shape[1]).repeat(3, 1, 1)
    hidden = model(**inputs).last_hidden_state[0].numpy()
    head = load_file(folder / "model.safetensors")["rm_head.weight"].numpy()
    found = []
    for i, marker in enumerate(("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")):
        (at,) = np.flatnonzero(ids[0].numpy() == tokenizer.convert_tokens_to_ids(marker))
        found.append(float(hidden[at] @ head[min(i, len(head) - 1)]))
    return np.array(found)


SAFE = "A red boat, é < |im_end|> < |VQ_reward|>"


@pytest.mark.parametrize("shape", [(9, 64, 96), (3, 96, 56), (5, 480, 720)])
def test_it_is_what_its_description_gives(
    folder: Path, clip: Callable[..., bytes], shape: tuple[int, int, int]
) -> None:
    video = clip(1, *shape)
    raw = expected(folder, video, SAFE)
    normal = (raw - [3.6757, 1.1646, 2.8105]) / [2.2476, 1.3811, 2.5121]
    result = scored(reward(folder), video)
    assert list(result.dimensions) == ["VQ", "MQ", "TA", "VQ_raw", "MQ_raw", "TA_raw"]
    # A pixel half-way between two numbers is rounded to either.
    assert list(result.dimensions.values()) == pytest.approx([*normal, *raw], abs=2e-2)
    assert result.score == pytest.approx(normal.sum(), abs=2e-2)
    assert min(abs(raw[0] - raw[1]), abs(raw[1] - raw[2])) > 0.2, "the markers differ"


def test_a_head_of_one_row_is_read_at_every_marker(tmp_path: Path, clip: Callable[..., bytes]) -> None:
    folder = save_tiny(tmp_path, rows=1)
    raw = expected(folder, clip(1, 2), SAFE)
    assert list(scored(reward(folder), clip(1, 2)).dimensions.values())[3:] == pytest.approx(raw, abs=2e-2)
    assert min(abs(raw[0] - raw[1]), abs(raw[1] - raw[2])) > 0.2


def test_patches_are_in_the_order_of_their_tokens(clip: Callable[..., bytes]) -> None:
    frames = read_video(clip(3, 4, 56, 112))[0]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    found, grid = qwen2_vl.patchify(pixels, 14, 2, 2)
    wanted, shape = numpy_patches(frames.astype(np.float64))
    assert grid == shape == [2, 4, 8]
    assert found.numpy() == pytest.approx(wanted, abs=1e-5)


def test_video_tokens_have_plain_positions(folder: Path, clip: Callable[..., bytes]) -> None:
    video = clip(2)
    usual = expected(folder, video, SAFE, "usual")
    found = np.array([scored(reward(folder), video).dimensions[f"{name}_raw"] for name in ("VQ", "MQ", "TA")])
    assert found == pytest.approx(expected(folder, video, SAFE), abs=2e-2)
    assert np.abs(found - usual).max() > 0.2


def test_a_video_and_a_query_change_it(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(reward(folder))
    first, other, asked = model.score([clip(1), clip(2), clip(1)], ["a", "a", "b"])
    for result in (first, other, asked):
        assert isinstance(result, Scored)
    assert all(abs(first.dimensions[n] - other.dimensions[n]) > 1e-4 for n in first.dimensions)
    # What is asked stands behind the first two markers.
    assert [abs(first.dimensions[n] - asked.dimensions[n]) > 1e-4 for n in ("VQ", "MQ", "TA")] == [0, 0, 1]
    assert first == model.score([clip(1)], ["a"])[0]


@pytest.mark.parametrize(
    ("count", "fps", "frames"),
    [
        (49, 8, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),
        (4, 30, [0, 1, 2, 3]),
        (30, 30, [0, 10, 19, 29]),
        (5, 30, [0, 1, 3, 4]),
        (3, 8, [0, 2]),
        (2, 8, [0, 1]),
    ],
)
def test_frames_are_even_in_number_and_uniform(count: int, fps: float, frames: list[int]) -> None:
    assert qwen2_vl.uniform_frames(count, fps, 2) == frames
    assert numpy_frames(count, fps) == frames


def test_frames_never_come_in_odd_numbers() -> None:
    for count in range(2, 400):
        found = qwen2_vl.uniform_frames(count, 7, 2)
        assert len(found) % 2 == 0
        assert found == sorted(set(found))
        assert (found[0], found[-1]) == (0, count - 1)
    assert len(qwen2_vl.uniform_frames(100_000, 24, 2)) == 768


def test_a_frame_is_resized_to_whole_patches(clip: Callable[..., bytes]) -> None:
    assert qwen2_vl.smart_size(480, 720, 28, 200_704) == (364, 532)
    assert 12 // 2 * (364 // 28) * (532 // 28) == 1482
    for height, width in ((480, 720), (1080, 1920), (64, 96), (30, 900), (224, 448)):
        assert qwen2_vl.smart_size(height, width, 28, 200_704) == numpy_size(height, width, 200_704)
    with pytest.raises(RewardError, match="200 times"):
        qwen2_vl.smart_size(10, 2001, 28, 200_704)


def test_pixels_are_resized_with_antialias_and_rounded(clip: Callable[..., bytes]) -> None:
    frames = read_video(clip(3, 2, 120, 200))[0]
    for size in ((56, 84), (224, 308)):
        found = qwen2_vl.resized(torch.from_numpy(frames), size).permute(0, 2, 3, 1).numpy()
        wanted = numpy_resized(frames, size)
        assert (found == np.round(found)).all()
        assert np.abs(found - wanted).max() <= 1
        assert (found != wanted).mean() < 1e-3, "but for ties"


def test_what_cannot_be_scored_is_an_error_of_its_row(folder: Path, clip: Callable[..., bytes]) -> None:
    model = build(reward(folder))
    one, broken, good, long = model.score(
        [clip(0, frames=1), b"broken", clip(0), clip(0)], ["q", "q", "q", "long " * 4096]
    )
    assert isinstance(one, RewardError)
    assert "frames in pairs" in str(one)
    assert isinstance(broken, RewardError)
    assert isinstance(good, Scored)
    assert isinstance(long, RewardError)
    assert "this model reads 4096" in str(long)


def test_a_template_is_checked(
    folder: Path, tmp_path: Path, clip: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vpo_ray").propagate = True
    build(reward(folder))
    assert "was trained with fdb6309bac618dd0" in caplog.text
    path = tmp_path / "other.txt"
    for text, says in (
        (TEMPLATE.replace("{text_prompt}", ""), r"must have \{text_prompt\} once"),
        (TEMPLATE + "<|VQ_reward|>", r"must have <\|VQ_reward\|> once"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(PluginError, match=says) as caught:
            build(reward(folder, template=str(path)))
        assert caught.value.stops_run
    with pytest.raises(PluginError, match=r"none\.txt"):
        build(reward(folder, template="none.txt"))


def test_a_folder_that_is_no_videoreward_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", 2)
    with pytest.raises(PluginError, match=r"rm_head.weight has the shape \(2, 32\), not \(1 or 3, 32\)"):
        build(reward(other))
    tensors = load_file(other / "model.safetensors")
    del tensors["rm_head.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(PluginError, match="is a Qwen2-VL, and no VideoReward"):
        build(reward(other))
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(PluginError, match=r"has no model.language_model.norm.weight"):
        build(reward(other))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == SPECIAL[-1]


def test_a_recipe_names_it_and_its_options(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = reward(folder, normalisation={"VQ": [0, 1]}, fps=1)
    given = recipe.load(TINY).model_copy(update={"reward": settings, "more_rewards": {}})
    found = dict(score.facts(given))
    assert found["reward.kind"].endswith("positions sequential, frames uniform at 1/s and even")
    assert {"reward.model", "reward.options.template", "torch", "transformers"} <= found.keys()
    assert settings.models() == {"model": str(folder)}
    assert settings.files() == {"options.template": str(folder / "template.txt")}
    assert plugins.find(settings).pin == "vpo_ray.engines.reward.videoreward:VideoReward@1"
    absent = given.model_copy(update={"reward": reward(tmp_path, template=str(tmp_path / "t.txt"))})
    with pytest.raises(PlanError) as caught:
        check_recipe(absent)
    assert "reward.options.template: no such file" in str(caught.value)
    assert "reward.model: " in str(caught.value)
    assert scored(settings, clip_of_one_colour()).dimensions["VQ"] == pytest.approx(
        scored(settings, clip_of_one_colour()).dimensions["VQ_raw"]
    )


def clip_of_one_colour() -> bytes:
    from vpo_ray.engines.video.engine import encode

    return encode(np.full((4, 64, 64, 3), 99, np.uint8), 8, 12)
