"""VideoScore on transformers' Idefics2: frames in their own shape, positions, and the five marks.

transformers computes the positions of a frame's patches in the dtype of its pixels: in bfloat16, 102 of 1,734
are then another's, and the marks are not those of the weights. Here they are computed in float32, as where
the weights were trained. All frames of a video have one size, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder, read_tensors
from vpo_ray.engines.reward.frames import read_frames
from vpo_ray.engines.reward.one_by_one import score_one_by_one
from vpo_ray.engines.reward.pav_frames import spread_frames
from vpo_ray.prompts.policy_prompt import control_tokens, neutralise
from vpo_ray.recipe import Reward

IMAGE, AROUND = "<image>", "<fake_token_around_image>"
_SHORTEST, _LONGEST = 378, 980  # of the checkpoint's preprocessor_config.json
_AT_ONCE = 16  # frames on the device


class VideoScoreScorer:
    """The marks of videos; see `videoscore`.

    Args:
        names: of the marks, in the order of the head's rows.
        most: frames at most.
    """

    def __init__(self, settings: Reward, names: Sequence[str], prompt: str, slot: str, most: int) -> None:
        from transformers import PreTrainedTokenizerFast

        folder = model_folder("model", settings.model)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.names, dtype = names, getattr(torch, settings.dtype)
        self.model, self.head = load_videoscore(folder, dtype, device, len(names))
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder}: no tokenizer.json; VideoScore is read with a fast tokenizer only"
            )
        # The plain class: what tokenizer.json says of white space around the frames counts.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if self.tokenizer.convert_tokens_to_ids(IMAGE) != self.model.config.image_token_id:
            raise CheckpointError(
                f"{folder}: {IMAGE} is not the tokenizer's token {self.model.config.image_token_id}"
            )
        self.control_tokens = control_tokens(self.tokenizer)
        self.before, self.after = prompt.split(slot)
        self.pick = partial(choose_spread, most=most)

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        return score_one_by_one(videos, queries, self._score)

    def _score(self, video: bytes | str, query: str) -> Scored:
        marks = self.marks(read_frames(video, self.pick), query).tolist()
        return Scored([], dict(zip(self.names, marks, strict=True)), float(np.mean(marks)))

    @torch.inference_mode()
    def marks(self, frames: np.ndarray, query: str) -> torch.Tensor:
        """The five raw numbers, float32, of frames uint8 (T, H, W, 3). Raises RewardError: it is too long."""
        ids = torch.tensor(self.tokens(len(frames), query), device=self.model.device)
        most = self.model.config.text_config.max_position_embeddings
        if len(ids) > most:
            raise RewardError(f"{len(frames)} frames and the query take {len(ids)} tokens of {most}")
        embeds = self.model.text_model.embed_tokens(ids)
        embeds[ids == self.model.config.image_token_id] = self.images(frames).flatten(0, 1)
        hidden = self.model.text_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
        # In the model's dtype, as the published numbers are.
        return self.head(hidden[0, -1]).float()

    def tokens(self, count: int, query: str) -> list[int]:
        """BOS, the prompt with the query, and each frame's tokens with a space after it."""
        latents = self.model.config.perceiver_config.resampler_n_latents
        frame = f"{AROUND}{IMAGE * latents}{AROUND} "
        text = self.before + neutralise(query, self.control_tokens) + self.after
        ids: list[int] = self.tokenizer(text + frame * count).input_ids
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def images(self, frames: np.ndarray) -> torch.Tensor:
        """Tokens (T, latents, width) of the frames."""
        device, dtype = self.model.device, self.model.dtype
        pixels = idefics2_pixels(frames)
        parts = [self._encode(part.to(device, dtype)) for part in pixels.split(_AT_ONCE)]
        return torch.cat(parts)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vision, config = self.model.vision_model, self.model.config.vision_config
        rows, columns = (side // config.patch_size for side in pixels.shape[-2:])
        places = patch_positions(rows, columns, config.image_size // config.patch_size)
        patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        embeds = patches + vision.embeddings.position_embedding(places.to(pixels.device))
        hidden = vision.encoder(inputs_embeds=embeds, attention_mask=None).last_hidden_state
        whole = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        found: torch.Tensor = self.model.connector(vision.post_layernorm(hidden), attention_mask=whole)
        return found


def choose_spread(timestamps: Sequence[float], fps: float, most: int) -> list[int]:
    """All frames, or `most` of a longer video; see `spread_frames`."""
    count = len(timestamps)
    return spread_frames(count, most) if count > most else list(range(count))


def idefics2_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (T, H, W, 3) to float32 (T, 3, h, w) from -1 to 1: no side longer than 980, then none shorter
    than 378, by Pillow's bilinear."""
    from PIL import Image

    height, width = frames.shape[1:3]
    shape = _fitting(height, width)
    if shape != (height, width):
        images = (Image.fromarray(frame) for frame in frames)
        frames = np.stack([np.asarray(i.resize(shape[::-1], Image.Resampling.BILINEAR)) for i in images])
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def _fitting(height: int, width: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > _LONGEST:
        height, width = int(_LONGEST / ratio), _LONGEST
    elif height > width and height > _LONGEST:
        height, width = _LONGEST, int(_LONGEST * ratio)
    return max(height, _SHORTEST), max(width, _SHORTEST)


def patch_positions(rows: int, columns: int, side: int) -> torch.Tensor:
    """Which of side x side learnt positions each of rows x columns patches has, by its place in the frame."""
    bounds = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32)

    def along(count: int) -> torch.Tensor:
        places = torch.arange(0, 1 - 1e-6, 1 / count, dtype=torch.float32)
        return torch.bucketize(places, bounds, right=True)

    return (along(rows)[:, None] * side + along(columns)).flatten()


def load_videoscore(folder: Path, dtype: torch.dtype, device: str, marks: int) -> tuple[Any, torch.nn.Linear]:
    """The Idefics2 and the head of a published folder, which gives so many marks.

    Raises:
        CheckpointError: another model, or tensors that are not VideoScore's.
    """
    from transformers import AutoConfig, Idefics2Model

    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "idefics2":
            raise CheckpointError(
                f"{folder} is a model of type {config.model_type}, and VideoScore is an idefics2"
            )
        model, found = Idefics2Model.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded from safetensors: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{folder} has no {', '.join(missing[:3])}: {len(missing)} are missing")
    tensors = dict(read_tensors(folder, device, "score."))
    width = config.text_config.hidden_size
    wanted = {"score.weight": (marks, width), "score.bias": (marks,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted:
        raise CheckpointError(f"{folder}: its head is {shapes or 'not there'}, and VideoScore's {wanted}")
    head = torch.nn.Linear(width, marks, device="meta")
    state = {name.removeprefix("score."): tensor.to(dtype) for name, tensor in tensors.items()}
    head.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), head.requires_grad_(False)
