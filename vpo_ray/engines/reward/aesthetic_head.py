"""LAION's aesthetic heads: linear maps of CLIP's image features, and the scorer of four frames.

V1 (LAION-AI/aesthetic-predictor) is one linear layer. V2 (christophschuhmann/improved-aesthetic-predictor) is
five with nothing but dropout between, so one map too, and another than V1's: their cosine is 0.369.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.checkpoint import CheckpointError
from vpo_ray.engines.reward.frames import read_frames
from vpo_ray.engines.reward.image_features import Clip
from vpo_ray.engines.reward.one_by_one import score_one_by_one
from vpo_ray.engines.reward.pav_frames import four_frames, pav_pixels
from vpo_ray.storage.model_cache import fetch

Variant = Literal["v1", "v2"]
_V2_LAYERS = (0, 2, 4, 6, 7)  # between them are dropouts


class AestheticScorer:
    """The mark of a video: the mean of four frames. See `laion_aesthetic`."""

    def __init__(self, clip: str, head: str, variant: Variant, device: str) -> None:
        self.clip = Clip("options.clip", clip, device)
        config = self.clip.model.config
        if (activation := config.vision_config.hidden_act) != "quick_gelu":
            raise CheckpointError(
                f"options.clip: {clip} computes with {activation}, and the predictor was trained on OpenAI's "
                "CLIP, which has quick_gelu: its config.json was made for another"
            )
        found = read_aesthetic_head("options.head", head, config.projection_dim, variant)
        self.weight, self.bias = (tensor.to(self.clip.model.device) for tensor in found)
        self.pick = four_frames

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        return score_one_by_one(videos, queries, self._score)

    def _score(self, video: bytes | str, query: str) -> Scored:
        features = self.clip.images(read_frames(video, self.pick), pav_pixels)
        mark = float((features @ self.weight.T + self.bias).mean())
        return Scored([], {"aesthetic": mark}, mark)


def read_aesthetic_head(
    key: str, path: str, width: int, variant: Variant = "v1"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1, width) and bias (1) of the head, float32, for features of length 1.

    Raises:
        CheckpointError: no safetensors file, or not of this variant and width; `key` names it in the message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(fetch(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{key}: {path} is no safetensors file ({error}); of LAION's .pth, make one with "
            "`vpo convert-reward`, or safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'head.safetensors')"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if variant == "v1":
        if shapes != {"weight": (1, width), "bias": (1,)}:
            raise CheckpointError(
                f"{key}: {path} has {shapes}; V1 on features of {width} has weight (1, {width}) and bias (1,)"
            )
        return found["weight"].float(), found["bias"].float()
    names = [f"layers.{i}.{part}" for i in _V2_LAYERS for part in ("weight", "bias")]
    if sorted(shapes) != sorted(names):
        raise CheckpointError(f"{key}: {path} has {', '.join(sorted(shapes))}; V2 has {', '.join(names)}")
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    try:
        for i in _V2_LAYERS:
            layer = found[f"layers.{i}.weight"].double()
            weight, bias = layer @ weight, layer @ bias + found[f"layers.{i}.bias"].double()
    except RuntimeError as error:
        raise CheckpointError(f"{key}: {path} is not on features of {width}: it has {shapes}") from error
    return weight.float(), bias.float()
