"""Attention over packs, as an implementation that transformers' models take by name.

Every run of a pack (see packing.Pack) reads the tokens given for it and no others, so that examples
neither see nor pay for each other. On a GPU all runs are one call of FlashAttention for sequences of
varying length (arXiv 2307.08691), which torch carries itself; elsewhere each run is one call of SDPA.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vpo_ray.train.packing import Pack

NAME = "vpo_packed"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of [1, heads, T, size] tensors by the layout of a pack, as [1, T, heads, size]; plain
    causal without a layout."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout: Pack | None = options.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    key, value = (_Gather.apply(t, layout.seen) for t in (key, value))
    if has_flash(query) and not options.get("dropout"):
        return _flash(query, key, value, layout, options.get("scaling"))[None], None
    parts = zip(query.split(layout.runs), key.split(layout.sees), value.split(layout.sees), strict=True)
    longest, most = max(layout.runs), max(layout.sees)
    mask = _causal(longest, most, query.dtype, query.device)
    out = []
    for part in parts:
        q, k, v = (t.transpose(0, 1)[None] for t in part)
        own, before = len(part[0]), len(part[1]) - len(part[0])
        seen = mask[:, :, :own, most - before : most + own] if before else None
        if seen is not None and seen.is_cuda:
            seen = seen.contiguous()  # its kernels want rows that are aligned
        out.append(sdpa_attention_forward(module, q, k, v, seen, **options)[0])
    return torch.cat(out, dim=1), None


@lru_cache(maxsize=1)
def _causal(rows: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores: nothing where token n of `rows` sees column up to before + n, or -inf.
    Kept from layer to layer, and by the backward pass, once for all runs of a pack."""
    unseen = torch.ones(rows, before + rows, dtype=torch.bool, device=device).triu(before + 1)
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, float("-inf"))[None, None]


def has_flash(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes queries [T, heads, size] like these where they are: half
    precision on Ampere or later."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Pack, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        *layout.ends,
        max(layout.runs),
        max(layout.sees),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


class _Gather(torch.autograd.Function):
    """tokens[index] along the first dimension. Gradients of a token that many see add up in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.tokens = len(tokens)
        return tokens.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.tokens, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, ctx.saved_tensors[0], grad.float()).to(grad.dtype), None
