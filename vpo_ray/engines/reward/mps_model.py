"""MPS: what of a query is of the condition's kind decides where its image is looked at.

CLIP gives tokens of the image, the query and the condition. A query's token takes part when it is like one of
the condition's; four layers of cross-attention from the image's tokens to those give one vector, whose cosine
to the query's is the score. Modules carry the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.checkpoint import CheckpointError, model_folder, read_tensors
from vpo_ray.engines.reward.frames import read_frames
from vpo_ray.engines.reward.one_by_one import score_one_by_one
from vpo_ray.engines.reward.pav_frames import four_frames, pav_pixels
from vpo_ray.prompts.policy_prompt import control_tokens, neutralise
from vpo_ray.recipe import Reward

State = dict[str, torch.Tensor]


class SwiGlu(nn.Module):
    """The first half times SiLU of the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class RotaryFrequencies(nn.Module):
    """Of half rotations, base 10000; the angles (tokens, head_dim) are float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(head_dim // 2))

    def forward(self, count: int) -> torch.Tensor:
        places = torch.arange(count, dtype=torch.float32, device=self.inv_freq.device)
        return torch.outer(places, self.inv_freq.float()).repeat(1, 2)


class CrossBlock(nn.Module):
    """The image's tokens look at the context, which is not normalised; a feed-forward beside it."""

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(dim, 2 * inner, bias=False), SwiGlu(), nn.Linear(inner, dim, bias=False)
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        attended = _attend(_heads(self.to_q(normed), self.head_dim), key, value, seen)
        return x + self.to_out(attended) + self.ff(normed)


class ParallelBlock(nn.Module):
    """The image's tokens look at each other; queries, keys, values and feed-forward are of one projection."""

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.parts = [heads * head_dim, head_dim, head_dim, 2 * inner]
        self.norm = nn.LayerNorm(dim)
        self.rotary_emb = RotaryFrequencies(head_dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGlu(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: torch.Tensor, context: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        query, key, value, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        angles = self.rotary_emb(x.shape[1])
        query, key = _rotated(_heads(query, self.head_dim), angles), _rotated(key, angles)
        return x + self.attn_out(_attend(query, key, value, None)) + self.ff_out(ff)


class CrossModel(nn.Module):
    """The layers, of the sizes that the checkpoint's tensors (without `cross_model.`) have."""

    def __init__(self, state: State) -> None:
        super().__init__()
        query, keys, inner = (state[f"layers.0.0.fn.{n}.weight"].shape for n in ("to_q", "to_kv", "ff.2"))
        head_dim = keys[0] // 2
        sizes = query[1], query[0] // head_dim, head_dim, inner[1]
        count = 1 + max(int(name.split(".")[1]) for name in state)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"fn": block(*sizes)}) for block in (CrossBlock, ParallelBlock))
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """x (images, tokens, dim), context (1, words, dim), `seen` (1, 1, 1, words) true where looked at."""
        for layer in self.layers:
            for block in layer:
                x = block["fn"](x, context, seen)
        return x


class MpsScorer:
    """The mean of four frames; see `mps`."""

    def __init__(self, settings: Reward, condition: str, threshold: float) -> None:
        from transformers import AutoTokenizer

        folder = model_folder("model", settings.model)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.clip, self.cross = load_mps(folder, getattr(torch, settings.dtype), device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.control_tokens = control_tokens(self.tokenizer)
        self.threshold, self.pick = threshold, four_frames
        with torch.inference_mode():
            self.condition = self._text(condition)[0]

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        return score_one_by_one(videos, queries, self._score)

    def _score(self, video: bytes | str, query: str) -> Scored:
        frames = torch.from_numpy(read_frames(video, self.pick))
        found = float(self.marks(frames, neutralise(query, self.control_tokens)).mean())
        return Scored([], {"mps": found}, found)

    @torch.inference_mode()
    def marks(self, frames: torch.Tensor, query: str) -> torch.Tensor:
        """The score (T) of each frame, uint8 (T, H, W, 3), float32. Of one query, because what of it is
        looked at is relative to its most fitting word."""
        words, pooled = self._text(query)
        alike = (words[0] @ self.condition[0].T).amax(dim=-1)
        seen = (alike / alike.max() > self.threshold)[None, None, None]
        fused = self.cross(self._image(frames), words, seen)[:, 0].float()
        return self.clip.logit_scale.float().exp() * F.cosine_similarity(fused, pooled.float())

    def _image(self, frames: torch.Tensor) -> torch.Tensor:
        """All tokens, before the layer norm that CLIP has for its pooled one."""
        vision = self.clip.config.vision_config
        pixels = pav_pixels(frames, vision.image_size).to(self.clip.device, self.clip.dtype)
        return self.clip.visual_projection(self.clip.vision_model(pixels).last_hidden_state)

    def _text(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected states (1, length, dim) of all places of a text, the padding's too, and of its end."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(text, truncation=True, max_length=length).input_ids
        last = len(ids) - 1
        ids = torch.tensor([ids + [self.tokenizer.eos_token_id] * (length - len(ids))])
        # Without a mask: the reference has none.
        states = self.clip.text_model(ids.to(self.clip.device)).last_hidden_state
        words = self.clip.text_projection(states)
        return words, words[:, last]


def load_mps(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, CrossModel]:
    """The CLIP and the cross-attention of a checkpoint folder.

    Raises:
        CheckpointError: no safetensors, or tensors that are not MPS's.
    """
    from transformers import CLIPConfig, CLIPModel

    tensors = dict(read_tensors(folder, device))
    of_clip, crossing = _under("model.", tensors), _under("cross_model.", tensors)
    if not of_clip or "layers.0.0.fn.to_kv.weight" not in crossing:
        raise CheckpointError(
            f"{folder}: its tensors are not MPS's `model.*` and `cross_model.*`; of the published pickle "
            "`vpo convert-reward` makes a folder that can be read"
        )
    try:
        config = CLIPConfig.from_pretrained(folder)
        _check_activation(folder, config)
        clip, found = CLIPModel.from_pretrained(
            None, config=config, state_dict=of_clip, dtype=dtype, output_loading_info=True
        )
        with torch.device("meta"):
            cross = CrossModel(crossing)
        cross.load_state_dict(crossing, assign=True)
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its tensors and its config.json are no MPS: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{folder}: no model.{', model.'.join(missing[:3])}: {len(missing)} are missing"
        )
    # Frequencies stay as stored: the angles of far tokens would be off by far in bfloat16.
    for parameter in cross.parameters():
        parameter.data = parameter.data.to(dtype)
    return clip.to(device).eval(), cross.eval().requires_grad_(False)


def _check_activation(folder: Path, config: Any) -> None:
    for part in (config.vision_config, config.text_config):
        if part.hidden_act != "gelu":
            raise CheckpointError(
                f"{folder}: config.json says {part.hidden_act}, and MPS's CLIP was trained with gelu: take "
                "that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
            )


def _under(prefix: str, tensors: State) -> State:
    # Old checkpoints hold the row of positions too, which is no weight.
    named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {name: tensor for name, tensor in named.items() if not name.endswith(".position_ids")}


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """All heads of `query` (images, heads, tokens, head_dim) share one key and value (images or 1, tokens,
    head_dim)."""
    images, heads = query.shape[:2]
    key, value = (part[:, None].expand(images, heads, -1, -1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)
