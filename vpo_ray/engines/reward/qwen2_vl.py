"""Qwen2-VL as VideoAlign runs it: its frames, pixels and positions, and a head at marker tokens.

Pixels are made here, since transformers' own processors of videos need torchvision. Positions are those of
the reference (transformers 4.45.2 with `inputs_embeds` alone): plain 0, 1, 2, ... on all three axes of the
rotary embedding, for video tokens too. With Qwen2-VL's usual positions the same weights give other marks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder, shard_files
from vpo_ray.engines.reward.frames import CLIP_MEAN, CLIP_STD
from vpo_ray.prompts.policy_prompt import control_tokens, neutralise
from vpo_ray.recipe import Reward

HEAD = "rm_head.weight"
# Limits of VideoAlign's vision_process.py.
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS = 128 * 28 * 28
MAX_RATIO = 200
_VIDEO = "<|video_pad|>"
# Qwen2-VL's chat template, of which the reference uses the default system prompt.
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


def uniform_frames(count: int, fps: float, rate: float) -> list[int]:
    """Indices of the frames that are shown: `rate` a second from the first to the last, an even number of
    them, at least 4 where there are so many.

    Raises:
        RewardError: fewer than two frames.
    """
    if count < 2:
        raise RewardError("the video has one frame, and this reward takes frames in pairs")
    most = min(MAX_FRAMES, count) // 2 * 2
    wanted = min(max(count / fps * rate, MIN_FRAMES), most)
    even = round(wanted / 2) * 2
    # In float32 and rounded half to even, as the reference.
    return [int(i) for i in torch.linspace(0, count - 1, even).round().long()]


def smart_size(height: int, width: int, factor: int, most: int) -> tuple[int, int]:
    """Height and width of the resized frame: multiples of `factor`, near the frame's shape, with at most
    `most` pixels and at least `MIN_PIXELS`.

    Raises:
        RewardError: one side is over 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise RewardError(f"frames of {width}x{height}: one side is over {MAX_RATIO} times the other")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def resized(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (T, H, W, 3) to float32 (T, 3, height, width) of whole numbers from 0 to 255: bicubic with
    antialias, rounded as torchvision rounds images of uint8."""
    pixels = frames.permute(0, 3, 1, 2).float()
    found = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return found.clamp(0, 255).round()


def patchify(pixels: torch.Tensor, patch: int, pair: int, merge: int) -> tuple[torch.Tensor, list[int]]:
    """Normalised patches (N, 3 * pair * patch * patch), and the grid: pairs of frames, rows, columns.

    The patches that are merged into one token follow each other. `pixels` are from 0 to 255,
    (T, 3, height, width), with T a multiple of `pair`.
    """
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    frames, _, height, width = pixels.shape
    grid = [frames // pair, height // patch, width // patch]
    cut = ((pixels / 255 - mean) / std).reshape(
        grid[0], pair, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid


class MarkedQwen:
    """A Qwen2-VL that reads a video and a text, and gives a number at each of three marker tokens.

    Args:
        template: the text, with `slot` for the query and every one of `markers` once.

    Raises:
        CheckpointError: the model, its head or its tokenizer is not what it should be.
    """

    def __init__(self, settings: Reward, template: str, slot: str, markers: Sequence[str]) -> None:
        from transformers import PreTrainedTokenizerFast

        folder = model_folder("reward.model", settings.model)
        self.before, self.after = template.split(slot)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: no tokenizer.json, with the marker tokens among its tokens")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.control_tokens = control_tokens(self.tokenizer)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        self.model = _backbone(folder, dtype, settings.attention).to(device).eval()
        self.head = _head_of(folder, self.model.config.text_config.hidden_size).to(device, dtype)
        words = self.model.config.text_config.vocab_size
        self.video = _token(self.tokenizer, _VIDEO, words, folder)
        self.markers = [_token(self.tokenizer, marker, words, folder) for marker in markers]

    def marks(self, frames: np.ndarray, query: str, most_pixels: int) -> list[float]:
        """The three numbers of a video for its query.

        Args:
            frames: uint8 (T, H, W, 3), T even.
            most_pixels: of a resized frame.

        Raises:
            RewardError: a shape, a length or a size that the model cannot take.
        """
        try:
            with torch.inference_mode():
                patches, grid = self.patches(frames, most_pixels)
                return self._read(patches, grid, query)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise RewardError(f"out of memory with this video alone: {error}") from error

    def patches(self, frames: np.ndarray, most_pixels: int) -> tuple[torch.Tensor, list[int]]:
        """What the vision tower takes; see `patchify`."""
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        size = smart_size(frames.shape[1], frames.shape[2], factor, max(most_pixels, factor**2))
        pixels = resized(torch.from_numpy(frames).to(self.model.device), size)
        return patchify(pixels, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)

    def token_ids(self, query: str, video_tokens: int) -> list[int]:
        """The chat: the video, then the template with the query, whose control tokens are broken up."""
        text = self.before + neutralise(query, self.control_tokens) + self.after
        # Control tokens end both parts, so that they can be tokenised apart.
        first, last = (
            self.tokenizer.encode(part, add_special_tokens=False)
            for part in (_BEFORE, _AFTER.replace("{text}", text))
        )
        return [*first, *[self.video] * video_tokens, *last]

    def _read(self, patches: torch.Tensor, grid: list[int], query: str) -> list[float]:
        model, device = self.model, self.model.device
        tokens = math.prod(grid) // model.config.vision_config.spatial_merge_size**2
        ids = torch.tensor([self.token_ids(query, tokens)], device=device)
        length, longest = ids.shape[1], model.config.text_config.max_position_embeddings
        if length > longest:
            raise RewardError(f"the video and the text are {length} tokens, this model reads {longest}")
        features = model.visual(patches.to(model.dtype), torch.tensor([grid], device=device)).pooler_output
        embedded = model.get_input_embeddings()(ids)
        embedded[ids == self.video] = features.to(embedded.dtype)
        positions = torch.arange(length, device=device).expand(3, 1, -1)
        hidden = model.language_model(
            inputs_embeds=embedded, position_ids=positions, use_cache=False
        ).last_hidden_state[0]
        at = [(ids[0] == marker).nonzero().item() for marker in self.markers]
        found = F.linear(hidden[at], self.head).float()
        # A head of one row is read at every marker, of three rows each has its own marker.
        return (found[:, 0] if len(self.head) == 1 else found.diagonal()).tolist()


def _backbone(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen2_vl":
            raise CheckpointError(
                f"reward.model: {folder} is a model of type {config.model_type}, not qwen2_vl"
            )
        # The class whose published names are these; its own head is not used.
        model, loaded = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"reward.model: {folder} cannot be loaded from safetensors: {error}; of published weights, "
            "`vpo convert-reward videoreward` makes such a folder"
        ) from error
    if missing := sorted(set(loaded["missing_keys"]) - {"lm_head.weight"}):
        raise CheckpointError(
            f"reward.model: {folder} has no {', '.join(missing[:3])}: {len(missing)} are missing"
        )
    return model.model


def _head_of(folder: Path, width: int) -> torch.Tensor:
    from safetensors import safe_open

    for path in shard_files(folder):
        with safe_open(path, "pt") as shard:
            if HEAD in shard.keys():  # noqa: SIM118
                head = shard.get_tensor(HEAD)
                if head.ndim == 2 and head.shape[0] in (1, 3) and head.shape[1] == width:
                    return head
                shape = tuple(head.shape)
                raise CheckpointError(f"{path}: {HEAD} has the shape {shape}, not (1 or 3, {width})")
    raise CheckpointError(f"{folder}: no {HEAD}: it is a Qwen2-VL, and no VideoReward")


def _token(tokenizer: Any, name: str, words: int, folder: Path) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    if found is None or found == tokenizer.unk_token_id or found >= words:
        raise CheckpointError(f"{folder}: its tokenizer and model have no token {name}")
    return int(found)
