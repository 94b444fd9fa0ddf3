"""CogVLM2-Video on transformers' own Llama, and the pass that answers all questions at once.

Videos and questions are packed into one row without padding: [prefix][question 1]...[question N]
for each video. Everything but attention sees one long row; attention runs within a prefix, and
from a group of questions to their prefix and themselves, so that no other pair costs anything.
Two habits of the reference's bfloat16 arithmetic are kept, because answers near the boundary
depend on them: the rotation's angles are computed in the model's dtype, and RMSNorm multiplies by
its weight before the one cast at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, repeat_kv

from vpo_ray.engines.reward import checkpoint
from vpo_ray.engines.reward.checkpoint import CheckpointError, Config
from vpo_ray.engines.reward.sequence import Layout
from vpo_ray.engines.reward.vision import VisionTower

_ATTENTION = "vpo_shared_prefix"

# Where a video's prefix lies in the packed row; where its groups of questions lie, and their masks.
Segment = tuple[slice, list[tuple[slice, torch.Tensor]]]


class RotaryEmbedding(nn.Module):
    """Position, angle, cos and sin each rounded to the model's dtype; frequencies as stored."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids.to(x.dtype)[..., None] * self.inv_freq.to(x.dtype)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class RMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x).to(hidden_states.dtype)


class CogVLM2Video(nn.Module):
    """The whole model. Build it with `load`."""

    def __init__(self, config: Config, attention: Literal["sdpa", "eager"] = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.vision = VisionTower(config)
        self.llm = LlamaForCausalLM(_llama_config(config))
        llama = self.llm.model
        llama.rotary_emb = RotaryEmbedding(config)
        llama.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for layer in llama.layers:
            layer.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            layer.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.boi.dtype

    @property
    def device(self) -> torch.device:
        return self.vision.boi.device

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frames (T, 3, size, size) to their tokens (T, frame_tokens, hidden_size)."""
        return self.vision(pixels.to(self.device, self.dtype))

    @torch.inference_mode()
    def answer(self, layouts: Sequence[Layout], features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits (questions, vocabulary), float32, at the last token of every question.

        Args:
            layouts: one for each video.
            features: `encode`'s result for each video.
        """
        hidden = self.hidden_states(layouts, features)
        starts = [sum(len(layout.tokens.ids) for layout in layouts[:i]) for i in range(len(layouts))]
        last = [start + i for start, layout in zip(starts, layouts, strict=True) for i in layout.last]
        logits = self.llm.lm_head(hidden[torch.tensor(last, device=self.device)]).float()
        return list(logits.split([len(layout.questions) for layout in layouts]))

    def hidden_states(self, layouts: Sequence[Layout], features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Normalised output of the last layer, (tokens of all videos, hidden_size)."""
        ids = torch.tensor([i for layout in layouts for i in layout.tokens.ids], device=self.device)
        places = torch.tensor([p for layout in layouts for p in layout.tokens.positions], device=self.device)
        vision = torch.tensor([v for layout in layouts for v in layout.tokens.vision], device=self.device)
        embeds = self.llm.model.embed_tokens(ids)
        embeds[vision] = torch.cat([f.flatten(0, 1) for f in features]).to(embeds.dtype)
        output = self.llm.model(
            inputs_embeds=embeds[None],
            position_ids=places[None],
            use_cache=False,
            segments=_segments(layouts, self.device),
            attend=_sdpa if self.attention == "sdpa" else _eager,
        )
        return output.last_hidden_state[0]


def load(
    folder: str | Path, dtype: torch.dtype, device: str, attention: Literal["sdpa", "eager"] = "sdpa"
) -> CogVLM2Video:
    """The model of a published checkpoint folder, in eval mode.

    It is built without memory and filled tensor by tensor on the device itself.

    Raises:
        CheckpointError: another architecture, or tensors that do not fit it (named).
    """
    config = checkpoint.read_config(folder)
    checkpoint.check_tensors(folder, checkpoint.tensor_shapes(config))
    with torch.device("meta"):
        model = CogVLM2Video(config, attention)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.read_tensors(folder, device):
        for own, part in _rename(name, tensor.to(dtype), config):
            if own in state and not torch.equal(state[own], part):
                raise CheckpointError(
                    f"{folder}: {name} differs from layer to layer; one set of frequencies is supported"
                )
            state[own] = part
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _rename(name: str, tensor: torch.Tensor, config: Config) -> list[tuple[str, torch.Tensor]]:
    """A published tensor as the parameters it becomes here: only q, k, v are more than one."""
    if name.startswith("model.vision."):
        return [(name.removeprefix("model."), tensor)]
    if name.endswith("rotary_emb.inv_freq"):
        return [("llm.model.rotary_emb.inv_freq", tensor)]
    name = "llm." + name.replace("mlp.language_mlp.", "mlp.").replace("language_expert_dense", "o_proj")
    if "language_expert_query_key_value" not in name:
        return [(name, tensor)]
    kv = config.num_multi_query_heads * config.head_dim
    parts = tensor.split([config.hidden_size, kv, kv])
    return [
        (name.replace("language_expert_query_key_value", f"{p}_proj"), t)
        for p, t in zip("qkv", parts, strict=True)
    ]


def _llama_config(config: Config) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_multi_query_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=False,
        attn_implementation=_ATTENTION,
    )


def _shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment],
    attend: Callable[..., torch.Tensor],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows; query (1, heads, tokens, dim), key and value with kv heads."""
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    output = torch.empty_like(query)
    for prefix, groups in segments:
        k, v = key[:, :, prefix], value[:, :, prefix]
        output[:, :, prefix] = attend(query[:, :, prefix], k, v, None)
        for own, mask in groups:
            seen_k, seen_v = torch.cat([k, key[:, :, own]], dim=2), torch.cat([v, value[:, :, own]], dim=2)
            output[:, :, own] = attend(query[:, :, own], seen_k, seen_v, mask)
    return output.transpose(1, 2), None


def group_size(device: torch.device) -> int:
    """Questions of one attention call: one on a CPU, where a small product without waste is the
    cheapest; all on a GPU, where a call costs more than the masked part of it."""
    return 1 if device.type == "cpu" else 1 << 30


def _segments(layouts: Sequence[Layout], device: torch.device) -> list[Segment]:
    segments: list[Segment] = []
    start, size = 0, group_size(device)
    for layout in layouts:
        groups = []
        for i in range(0, len(layout.questions), size):
            ranges = layout.questions[i : i + size]
            mask = _mask([end - begin for begin, end in ranges], layout.prefix, device)
            groups.append((slice(start + ranges[0][0], start + ranges[-1][1]), mask))
        segments.append((slice(start, start + layout.prefix), groups))
        start += len(layout.tokens.ids)
    return segments


def _mask(lengths: Sequence[int], prefix: int, device: torch.device) -> torch.Tensor:
    """True where a token of these questions sees: the whole prefix, and its own question so far."""
    own = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    causal = torch.ones(len(own), len(own), dtype=torch.bool, device=device).tril()
    return F.pad(causal & (own[:, None] == own), (prefix, 0), value=True)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Products in the model's dtype, softmax in float32: what the reference does under padding."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = weights.masked_fill(~mask, torch.finfo(q.dtype).min)
    return weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(_ATTENTION, _shared_prefix_attention)
