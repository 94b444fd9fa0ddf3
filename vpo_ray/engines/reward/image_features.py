"""Features of frames by CLIP and DINO, from the pixels that VBench gives them (its `utils.py`).

VBench reads a video as float32 from 0 to 255 and resizes it without antialias, so that nothing is rounded
or clamped between: a checkpoint's features follow from that. Here both models compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder
from vpo_ray.engines.reward.frames import CLIP_MEAN, CLIP_STD

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_AT_ONCE = 32  # frames on the device


def clip_pixels(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (T, H, W, 3) to float32 (T, 3, size, size): shorter side to `size`, bicubic, centre crop."""
    pixels = _resized(frames, size, "bicubic")
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    return _normalised(pixels[..., top : top + size, left : left + size] / 255, CLIP_MEAN, CLIP_STD)


def antialiased_pixels(frames: torch.Tensor, size: int) -> torch.Tensor:
    """As `clip_pixels`, but resized by Pillow, which antialiases and rounds: VBench's appearance style, and
    what Prompt-A-Video's scorers see."""
    from PIL import Image

    shape = _shape(frames.shape[1], frames.shape[2], size)
    images = [Image.fromarray(f).resize(shape[::-1], Image.Resampling.BICUBIC) for f in frames.cpu().numpy()]
    return clip_pixels(torch.from_numpy(np.stack([np.asarray(i) for i in images])).to(frames.device), size)


def dino_pixels(frames: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (T, H, W, 3) to float32 (T, 3, h, w): shorter side to `size`, bilinear, no crop."""
    return _normalised(_resized(frames, size, "bilinear") / 255, _IMAGENET_MEAN, _IMAGENET_STD)


def _shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side `size`; the longer one is floored."""
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def _resized(frames: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    pixels = frames.permute(0, 3, 1, 2).float()
    return F.interpolate(
        pixels, _shape(frames.shape[1], frames.shape[2], size), mode=mode, align_corners=False
    )


def _normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    centre, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - centre) / scale


class Encoder:
    """Features of length 1 of all frames of a video; so many frames at once that memory is bounded."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size = model, size

    def _features(
        self,
        frames: np.ndarray,
        pixels: Callable[[torch.Tensor, int], torch.Tensor],
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        parts = (torch.from_numpy(frames[i : i + _AT_ONCE]) for i in range(0, len(frames), _AT_ONCE))
        with torch.inference_mode():
            found = [encode(pixels(part.to(self.model.device), self.size)) for part in parts]
            return F.normalize(torch.cat(found), dim=-1)


class Clip(Encoder):
    """A CLIP checkpoint. Raises CheckpointError where it cannot be loaded; `key` names it in the message."""

    def __init__(self, key: str, name: str, device: str) -> None:
        from transformers import CLIPModel

        self.folder = model_folder(key, name)
        model = _load(key, CLIPModel, "clip", self.folder, device)
        super().__init__(model, model.config.vision_config.image_size)

    def images(
        self, frames: np.ndarray, pixels: Callable[[torch.Tensor, int], torch.Tensor] = clip_pixels
    ) -> torch.Tensor:
        return self._features(
            frames, pixels, lambda p: self.model.get_image_features(pixel_values=p).pooler_output
        )

    def text(self, text: str) -> torch.Tensor:
        """The features (1, width) of a text, cut at the model's length."""
        from transformers import AutoTokenizer

        length = self.model.config.text_config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokens = tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            found = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
            return F.normalize(found, dim=-1)


class Dino(Encoder):
    """A DINO checkpoint: the CLS token of its last layer, with positions interpolated to the frame's shape.
    Raises CheckpointError."""

    def __init__(self, key: str, name: str, device: str) -> None:
        from transformers import ViTModel

        model = _load(key, ViTModel, "vit", model_folder(key, name), device, add_pooling_layer=False)
        super().__init__(model, model.config.image_size)

    def images(self, frames: np.ndarray) -> torch.Tensor:
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]

        return self._features(frames, dino_pixels, encode)


def _load(key: str, kind: Any, name: str, folder: Path, device: str, **more: Any) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != name:
            raise CheckpointError(f"{key}: {folder} is a model of type {config.model_type}, not {name}")
        model, loaded = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **more
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{key}: {folder} cannot be loaded from safetensors: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise CheckpointError(f"{key}: {folder} has no {', '.join(missing[:3])}: {len(missing)} are missing")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
