"""Attention over packs, as an implementation that transformers models take by name.

Each run of a pack (see packing.Pack) attends to its own tokens and no others, so that examples neither
see nor pay for each other. On a GPU all runs are one call of variable-length FlashAttention (arXiv
2307.08691), which torch includes; elsewhere each run is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vpo_ray.train.packing import Pack

NAME = "vpo_packed"

# Most keys of a run for which SDPA's backward kernel on a CPU is faster in float32 than in bfloat16: measured
# with 9 heads of 64, four times as fast at 100 keys, equal between 512 and 1,024.
NARROW_FROM = 512

# (module, query [T, heads, size], key and value [T, key heads, size], layout, options) to [T, heads, size].
Kernel = Callable[[nn.Module, Tensor, Tensor, Tensor, Pack, dict[str, Any]], Tensor]


def register_attention() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of [1, heads, T, size] tensors by the layout of a pack, as [1, T, heads, size]; plain
    causal attention without a layout."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout: Pack | None = options.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave queries and keys wide
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    kernel = kernel_for(query, options.get("dropout") or 0.0)
    return kernel(module, query, key, value, layout, options)[None], None


def kernel_for(query: Tensor, dropout: float) -> Kernel:
    """The kernel for queries [T, heads, size] of this dtype and device."""
    if dropout:
        return sdpa
    if query.device.type == "cpu":
        return on_cpu
    takes_it = (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    return flash if takes_it else sdpa


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Pack, options: dict[str, Any]
) -> Tensor:
    """All runs at once by FlashAttention: half precision on an NVIDIA Ampere or later."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = (_Gather.apply(t, layout.seen) for t in (key, value))
    return varlen_attn(
        query,
        key,
        value,
        *layout.ends,
        max(layout.runs),
        max(layout.sees),
        scale=options.get("scaling"),
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Pack, options: dict[str, Any]
) -> Tensor:
    """Run by run with SDPA's CPU kernel, keeping less for the backward pass."""
    return _OnCpu.apply(query, key, value, layout, options.get("scaling"))


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Pack, options: dict[str, Any]
) -> Tensor:
    """Run by run with whatever SDPA chooses: for any device, and for dropout."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = (_Gather.apply(t, layout.seen) for t in (key, value))
    parts = zip(query.split(layout.runs), key.split(layout.sees), value.split(layout.sees), strict=True)
    out = []
    for part in parts:
        mask = _mask(layout, len(part[0]), len(part[1]), query)
        if mask is not None:
            mask = mask.contiguous()  # GPU kernels need aligned rows
        q, k, v = (t.transpose(0, 1)[None] for t in part)
        out.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0][0])
    return torch.cat(out)


def _mask(layout: Pack, own: int, sees: int, query: Tensor) -> Tensor | None:
    """The mask added to the scores of a run, [1, 1, own, sees]; None where plain causal is the same."""
    before, most = sees - own, max(layout.sees)
    causal = _causal(max(layout.runs), most, query.dtype, query.device)
    return causal[:, :, :own, most - before : most + own] if before else None


@lru_cache(maxsize=2)  # of the forward and of the backward pass
def _causal(rows: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where token n of `rows` sees columns up to before + n, else -inf. Every mask of a pack is a slice of
    this one, which all layers and the backward pass share."""
    unseen = torch.ones(rows, before + rows, dtype=torch.bool, device=device).triu(before + 1)
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, float("-inf"))[None, None]


class _Gather(torch.autograd.Function):
    """tokens[index] along the first dimension. Gradients of a token that many see are summed in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.tokens = len(tokens)
        return tokens.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.saved_tensors[0], ctx.tokens), None


def _scatter(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Gradients of `tokens` from those of tokens[index]."""
    total = grad.new_zeros(tokens, *grad.shape[1:], dtype=torch.float32)
    return total.index_add_(0, index, grad.float()).to(grad.dtype)


class _OnCpu(torch.autograd.Function):
    """Gathers keys and values again in the backward pass, so that only the inputs and the output are kept.
    With SDPA itself every run would keep its own keys and values, and its part of the output too."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Pack, scale: float | None
    ) -> Tensor:
        out, sums = torch.empty_like(query), []
        for o, (q, k, v, mask) in zip(out.split(layout.runs), _runs(query, key, value, layout), strict=True):
            part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            o.copy_(part[0].transpose(0, 1))
            sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        layout: Pack = ctx.layout
        dtype = grad.dtype
        if max(layout.sees) <= NARROW_FROM:
            query, key, value, out, grad = (t.float() for t in (query, key, value, out, grad))
        d_query, found = torch.empty_like(query), []
        parts = (grad.split(layout.runs), out.split(layout.runs), d_query.split(layout.runs), sums)
        runs = _runs(query, key, value, layout)
        for g, o, d, total, (q, k, v, mask) in zip(*parts, runs, strict=True):
            g, o = (t.transpose(0, 1)[None] for t in (g, o))
            d_q, *d_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, total, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
            )
            d.copy_(d_q[0].transpose(0, 1))
            found.append([t[0].transpose(0, 1).unflatten(1, (key.shape[1], -1)).sum(2) for t in d_kv])
        d_key, d_value = (_scatter(torch.cat(ds), layout.seen, len(key)) for ds in zip(*found, strict=True))
        return d_query.to(dtype), d_key.to(dtype), d_value.to(dtype), None, None


def _runs(query: Tensor, key: Tensor, value: Tensor, layout: Pack) -> Iterator[tuple[Tensor | None, ...]]:
    """Query, keys and values of each run as [1, heads, tokens, size], and its mask."""
    group = query.shape[1] // key.shape[1]
    for q, numbers in zip(query.split(layout.runs), layout.seen.split(layout.sees), strict=True):
        k, v = (t.index_select(0, numbers).repeat_interleave(group, dim=1) for t in (key, value))
        yield *(t.transpose(0, 1)[None] for t in (q, k, v)), _mask(layout, len(q), len(k), query)
