"""CogVLM2-Video on transformers' own Llama, and the pass that answers all questions at once.

Videos and questions are packed into one row without padding: [prefix][tree of questions] for each video.
Everything but attention sees one long row. Attention runs within a prefix, and from a group of chains to
their prefix, their ancestors and themselves, so that no other pair costs anything. The last layer computes
only the tokens where an answer is read, and keys and values of the others.
Two details of the reference's bfloat16 arithmetic are kept, because answers near the boundary depend on them:
rotary angles are computed in the model's dtype, and RMSNorm multiplies by its weight before the final cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    repeat_kv,
    rotate_half,
)

from vpo_ray.engines.reward import checkpoint
from vpo_ray.engines.reward.checkpoint import CheckpointError, Config
from vpo_ray.engines.reward.sequence import Layout
from vpo_ray.engines.reward.vision import VisionTower

_ATTENTION = "vpo_shared_prefix"


@dataclass(frozen=True)
class Group:
    """Tokens `own` of the packed row and what they see: their video's prefix (all of it, told apart by
    Segment) and the tokens `seen`, `mask` (own tokens, prefix + seen tokens) true where they do."""

    own: slice | torch.Tensor
    seen: slice | torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """One video in the packed row: its prefix, the groups of its question tokens, and the group of
    those tokens where answers are read."""

    prefix: slice
    groups: list[Group]
    read: Group


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


class LastLayer(LlamaDecoderLayer):
    """With `read`, the layer's output at these tokens only: (1, len(read), hidden_size)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Sequence[Segment],
        attend: Callable[..., torch.Tensor],
        read: torch.Tensor | None,
        **rest: Any,
    ) -> torch.Tensor:
        if read is None:
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                segments=segments,
                attend=attend,
                **rest,
            )
        own, (cos, sin) = self.self_attn, position_embeddings
        states = self.input_layernorm(hidden_states)

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, own.head_dim)).transpose(1, 2)

        query = _rotate(heads(own.q_proj(states[:, read])), cos[:, read], sin[:, read])
        key, value = _rotate(heads(own.k_proj(states)), cos, sin), heads(own.v_proj(states))
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        reads = [segment.read for segment in segments]
        parts = query.split([len(group.mask) for group in reads], dim=2)
        answers = [
            attend(part, _seen(key, segment, group), _seen(value, segment, group), group.mask)
            for part, segment, group in zip(parts, segments, reads, strict=True)
        ]
        attended = own.o_proj(torch.cat(answers, dim=2).transpose(1, 2).flatten(2))
        hidden = hidden_states[:, read] + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class CogVLM2Video(nn.Module):
    """The whole model. Build it with `load_reward_model`."""

    def __init__(self, config: Config, attention: Literal["sdpa", "eager"] = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.vision = VisionTower(config)
        self.llm = LlamaForCausalLM(_llama_config(config))
        llama = self.llm.model
        llama.rotary_emb = RotaryEmbedding(config)
        llama.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        llama.layers[-1] = LastLayer(self.llm.config, config.num_hidden_layers - 1)
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
        starts = [sum(len(layout.tokens.ids) for layout in layouts[:i]) for i in range(len(layouts))]
        last = [start + i for start, layout in zip(starts, layouts, strict=True) for i in layout.last]
        hidden = self.hidden_states(layouts, features, torch.tensor(last, device=self.device))
        logits = self.llm.lm_head(hidden).float()
        return list(logits.split([len(layout.last) for layout in layouts]))

    def hidden_states(
        self, layouts: Sequence[Layout], features: Sequence[torch.Tensor], read: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalised output of the last layer, (tokens, hidden_size).

        Args:
            read: indices into the packed row of all videos, the `last` of every layout in order; None
                for all tokens.
        """
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
            read=read,
            attend=_sdpa if self.attention == "sdpa" else _eager,
        )
        return output.last_hidden_state[0]


def load_reward_model(
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
    for segment in segments:
        prefix = segment.prefix
        output[:, :, prefix] = attend(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], None)
        for group in segment.groups:
            seen_key, seen_value = _seen(key, segment, group), _seen(value, segment, group)
            output[:, :, group.own] = attend(query[:, :, group.own], seen_key, seen_value, group.mask)
    return output.transpose(1, 2), None


def _seen(states: torch.Tensor, segment: Segment, group: Group) -> torch.Tensor:
    return torch.cat([states[:, :, segment.prefix], states[:, :, group.seen]], dim=2)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


def group_size(device: torch.device) -> int:
    """Number of chains in one attention call: one on a CPU, where small products without waste are fastest;
    all on a GPU, where a call costs more than its masked part."""
    return 1 if device.type == "cpu" else 1 << 30


def _segments(layouts: Sequence[Layout], device: torch.device) -> list[Segment]:
    segments: list[Segment] = []
    start, size = 0, group_size(device)
    for layout in layouts:
        sees = visibility(layout)
        total = len(layout.tokens.ids)
        groups = []
        for i in range(0, len(layout.chains), size):
            chains = layout.chains[i : i + size]
            begin, end = chains[0].start, chains[-1].end
            # Outside of itself the group sees its ancestors' tokens.
            rows = sees[begin - layout.prefix : end - layout.prefix]
            columns = rows.any(0).nonzero()[:, 0]
            mask = F.pad(rows[:, columns], (layout.prefix, 0), value=True)
            seen = (columns + layout.prefix + start).to(device)
            groups.append(Group(slice(start + begin, start + end), seen, mask.to(device)))
        last = torch.tensor(layout.last)
        mask = F.pad(sees[last - layout.prefix], (layout.prefix, 0), value=True)
        read = Group(start + last, slice(start + layout.prefix, start + total), mask.to(device))
        segments.append(Segment(slice(start, start + layout.prefix), groups, read))
        start += total
    return segments


def visibility(layout: Layout) -> torch.Tensor:
    """True where a question token (row) sees another (column): those of its ancestors, and earlier ones of
    its own chain. Both are counted from the end of the prefix."""
    count = len(layout.tokens.ids) - layout.prefix
    sees = torch.zeros(count, count, dtype=torch.bool)
    for number, chain in enumerate(layout.chains):
        own = slice(chain.start - layout.prefix, chain.end - layout.prefix)
        for ancestor in layout.ancestors(number):
            before = layout.chains[ancestor]
            sees[own, before.start - layout.prefix : before.end - layout.prefix] = True
        length = chain.end - chain.start
        sees[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
    return sees


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Products in the model's dtype, softmax in float32, as the reference does with padding."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = weights.masked_fill(~mask, torch.finfo(q.dtype).min)
    return weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(_ATTENTION, _shared_prefix_attention)
