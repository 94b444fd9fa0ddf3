"""The policy as training sees it: from a pack to the log-probability of every learnt token.

Attention follows the pack's layout, so that examples neither see nor pay for each other. The head computes
logits only for learnt tokens, in chunks that bound its memory whatever the vocabulary. With `autocast` the
products of matrices are bfloat16's; weights, their gradients and log-probabilities stay float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vpo_ray.train.examples import Example, TrainError
from vpo_ray.train.packing import Pack, pack
from vpo_ray.train.vision import ImageFeatures

# Float32 elements of a chunk of logits, and of the probabilities kept for the backward pass; beyond the
# second number they are recomputed. 256 MiB each.
CHUNK = KEEP = 2**26

# Elements per sum of exponentials, which torch computes from a copy: 16 MiB.
SLICE = 2**22


class ResponseHead(nn.Linear):
    """The output embedding, which can also turn hidden states into log-probabilities directly."""

    @classmethod
    def of(cls, linear: nn.Linear) -> ResponseHead:
        """The same parameters (also where ZeRO-3 has partitioned them) in a new module."""
        head = cls(1, 1, bias=linear.bias is not None, device="meta")
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of `hidden`, or with `targets` ([N] for hidden [N, d]) their log-probabilities [N],
        in float32."""
        if targets is None:
            return super().forward(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return _LogProbs.apply(hidden, self.weight, self.bias, targets)


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], chunk by chunk. In the backward pass,
    d/d logits = one_hot(target) - softmax, from kept or recomputed probabilities. Products are computed in
    the dtype of `hidden`, which may be narrower than that of the weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows, narrow = max(1, CHUNK // weight.shape[0]), weight.to(hidden.dtype)
        keep = any(ctx.needs_input_grad) and hidden.shape[0] * weight.shape[0] <= KEEP
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        kept, norms = [], []
        for h, t, o in zip(hidden.split(rows), targets.split(rows), out.split(rows), strict=True):
            logits = nn.functional.linear(h, narrow, bias).float()
            slices = logits.split(max(1, SLICE // weight.shape[0]))
            norm = torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in slices])
            torch.sub(logits.gather(1, t[:, None]), norm, out=o[:, None])
            norms.append(norm)
            if keep:
                kept.append(logits.sub_(norm).exp_())
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        ctx.rows, ctx.kept = rows, kept
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        narrow = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias) if bias is not None else None
        chunks = zip(*(t.split(ctx.rows) for t in (hidden, targets, norms, grad, d_hidden)), strict=True)
        for n, (h, t, norm, g, d) in enumerate(chunks):
            if ctx.kept:
                d_logits = ctx.kept[n]
            else:
                d_logits = nn.functional.linear(h, narrow, bias).float().sub_(norm).exp_()
            d_logits.mul_(-g[:, None]).scatter_add_(1, t[:, None], g[:, None])
            d_logits = d_logits.to(h.dtype)
            torch.mm(d_logits, narrow, out=d)
            if ctx.needs_input_grad[1] and d_weight is None:
                d_weight = (d_logits.T @ h).to(weight.dtype)
            elif d_weight is not None and h.dtype == weight.dtype:
                d_weight.addmm_(d_logits.T, h)
            elif d_weight is not None:
                d_weight += d_logits.T @ h
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.kept = []
        return d_hidden, d_weight, d_bias, None


class PackedPolicy(nn.Module):
    """A Hugging Face causal LM that takes packs. `forward` gives [N] log-probabilities.

    Args:
        autocast: products of matrices in bfloat16, whatever the weights are.
        images: features of the images that prompts show, where any does.
    """

    def __init__(self, model: Any, autocast: bool = False, images: ImageFeatures | None = None) -> None:
        super().__init__()
        self.autocast, self.images = autocast, images
        model.set_output_embeddings(ResponseHead.of(model.get_output_embeddings()))
        model.config.use_cache = False
        self.model = model

    def forward(self, pack: Pack, plain: bool = False) -> Tensor:
        """`plain` runs the model's own forward, for a pack of one response (see check_packing)."""
        with self._casting(pack.ids.device.type):
            return self._forward(pack, plain)

    def _casting(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16, enabled=self.autocast)

    def _forward(self, pack: Pack, plain: bool) -> Tensor:
        ids = {"input_ids": pack.ids}
        if plain:
            given = ids if self.images is None else self.images.whole(pack.ids)
            logits = self.model(**given, use_cache=False).logits[0, pack.predict].float()
            return logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
        # Under ZeRO-3 all ranks must do the same: also where this pack has no image.
        given = ids if self.images is None else {"inputs_embeds": self.images.embedded(pack.ids)}
        decoder = self.model.get_decoder()
        hidden = decoder(**given, position_ids=pack.positions, layout=pack, use_cache=False)[0]
        return self.model.get_output_embeddings()(hidden[0, pack.predict], pack.targets)


def autocasts(choice: str, device: torch.device) -> bool:
    """Whether a recipe's `autocast` means bfloat16 on a device; `auto` does where hardware has it."""
    if choice != "auto":
        return choice == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def check_packing(policy: Any, example: Example, device: torch.device, tolerance: float) -> None:
    """Compare packed log-probabilities of an example with the model's own forward pass.

    Models that change logits after the head, or whose attention is not the usual one, would otherwise
    silently train on wrong numbers. Pass the longest example, which also reveals a sliding window.

    Raises:
        TrainError: the mean difference per token is above `tolerance`.
    """
    packed = policy(pack([example]).to(device))
    plain = [
        policy(pack([Example("", example.prompt, (r,))]).to(device), plain=True) for r in example.responses
    ]
    difference = (packed - torch.cat(plain)).abs().mean().item()
    if not difference <= tolerance:
        raise TrainError(
            f"this model's log-probabilities differ by {difference:.3g} per token when packed, at most "
            f"{tolerance:g} is rounding: its architecture does something between attention and logits "
            "that packing does not support; use a model with ordinary causal attention, such as Llama or Qwen"
        )
