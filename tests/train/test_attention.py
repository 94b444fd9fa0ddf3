import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_data import pairs, settings

from vpo_ray.train import attention
from vpo_ray.train.examples import Example
from vpo_ray.train.packing import Pack, pack

pytestmark = pytest.mark.engine


def scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[heads, tokens, keys] for the last tokens of a sequence, by definition: -inf for what comes later."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    later = torch.ones(len(query), len(keys), dtype=torch.bool).triu(len(keys) - len(query) + 1)
    return torch.einsum("qhd,khd->hqk", query, keys).mul(scale).masked_fill(later, float("-inf"))


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention, [tokens, heads, size], and the logarithms of its sums, [heads, tokens]."""
    values = values.repeat_interleave(query.shape[1] // values.shape[1], dim=1)
    found = scores(query, keys, scale)
    return torch.einsum("hqk,khd->qhd", found.softmax(-1), values), found.logsumexp(-1)


def attend_backward(
    query: Tensor, keys: Tensor, values: Tensor, grad: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend`'s inputs, by the chain rule."""
    weights = (scores(query, keys, scale) - lse[..., None]).exp()
    group = query.shape[1] // keys.shape[1]
    repeated = values.repeat_interleave(group, dim=1)
    d_weights = torch.einsum("qhd,khd->hqk", grad, repeated)
    d_scores = weights * (d_weights - torch.einsum("qhd,qhd->hq", grad, out)[..., None]) * scale
    d_query = torch.einsum("hqk,khd->qhd", d_scores, keys.repeat_interleave(group, dim=1))
    d_keys = torch.einsum("hqk,qhd->khd", d_scores, query)
    d_values = torch.einsum("hqk,qhd->khd", weights, grad)
    return d_query, *(t.unflatten(1, (-1, group)).sum(2) for t in (d_keys, d_values))


@pytest.fixture
def flash_calls() -> list[int]:
    """The operators under torch's varlen_attn, which have kernels for GPUs only, with kernels for the
    CPU that follow their definition. Gives the number of sequences of each call."""
    calls: list[int] = []

    def runs(ends_q: Tensor, ends_k: Tensor, per_query: list[Tensor], per_key: list[Tensor]) -> Any:
        split = [
            t.split(ends.diff().tolist()) for ends, ts in ((ends_q, per_query), (ends_k, per_key)) for t in ts
        ]
        return zip(*split, strict=True)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends_q: Tensor,
        ends_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        scale: float,
        window: list[int],
        gqa: bool,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert causal
        assert window == [-1, 0]
        assert gqa == (query.shape[1] != key.shape[1])
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert (max_q, max_k) == tuple(int(ends.diff().max()) for ends in (ends_q, ends_k))
        calls.append(len(ends_q) - 1)
        parts = [attend(*run, scale) for run in runs(ends_q, ends_k, [query], [key, value])]
        out, lse = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        ends_q, ends_k, scale = rest[0], rest[1], rest[6]
        of_queries = [query, grad, out, lse.T.contiguous()]
        parts = [
            attend_backward(q, k, v, g, o, sums.T, scale)
            for q, g, o, sums, k, v in runs(ends_q, ends_k, of_queries, [key, value])
        ]
        d_query, d_key, d_value = (torch.cat(part) for part in zip(*parts, strict=True))
        return d_query, d_key, d_value

    importlib.import_module("torch.nn.attention.varlen")  # registers the operators
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    return calls


def results(worker: Any, packed: Pack) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of a pack and the gradients of their weighted sum."""
    policy = worker.engine.module
    policy.zero_grad()
    out = policy(packed)
    (out * torch.linspace(-1, 1, len(out))).sum().backward()
    return out.detach(), [p.grad.clone() for p in policy.parameters()]


def test_every_kernel_gives_the_same(make_worker: Any, flash_calls: list[int], monkeypatch: Any):
    worker = make_worker("dpo", pairs(5), settings())
    config = worker.engine.module.model.config
    assert config.num_key_value_heads < config.num_attention_heads  # grouped queries too
    packed = pack(worker.job.examples)
    found = {}
    for kernel in (attention.sdpa, attention.on_cpu, attention.flash):
        monkeypatch.setattr(attention, "kernel_for", lambda *args, kernel=kernel: kernel)
        found[kernel] = results(worker, packed)
    assert flash_calls == [len(packed.runs)] * config.num_hidden_layers
    for kernel in (attention.on_cpu, attention.flash):
        torch.testing.assert_close(found[kernel], found[attention.sdpa], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [0, 512])
def test_bfloat16_gradients_on_a_cpu_are_those_of_float32_but_for_rounding(
    monkeypatch: Any, most: int
) -> None:
    monkeypatch.setattr(attention, "NARROW_FROM", most)
    prompt = np.arange(5)
    packed = pack([Example("a", prompt, (np.arange(7), np.arange(3))), Example("b", prompt[:4], (prompt,))])
    torch.manual_seed(3)
    given = [torch.randn(packed.ids.shape[1], heads, 8).bfloat16() for heads in (4, 2, 2)]
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [t.to(dtype, copy=True).requires_grad_() for t in given]
        attention.on_cpu(torch.nn.Identity(), *tensors, packed, {}).float().square().sum().backward()
        assert all(t.grad.dtype == dtype for t in tensors)
        found[dtype] = [t.grad.float() for t in tensors]
    for narrow, wide in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        assert (narrow - wide).norm() < 0.02 * wide.norm()


def test_dropout_needs_sdpa_and_a_cpu_has_a_kernel_of_its_own():
    query = torch.zeros(3, 2, 8)
    assert attention.kernel_for(query, 0.0) is attention.on_cpu
    assert attention.kernel_for(query, 0.1) is attention.sdpa
    assert attention.kernel_for(query.to("meta"), 0.0) is attention.sdpa


def test_gradients_of_a_token_that_many_see_add_up_without_rounding():
    tokens = torch.zeros(3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = attention._Gather.apply(tokens, torch.tensor([1] * 300 + [2]))
    gathered.backward(torch.ones_like(gathered))
    assert tokens.grad.flatten().tolist() == [0, 300, 1]  # 256 where bf16 adds one to one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_on_a_gpu_equals_sdpa(monkeypatch: Any, kv_heads: int):
    tokens = [np.arange(n, dtype=np.int32) for n in range(40, 90)]
    layout = pack([Example(str(n), tokens[n], (tokens[20 + n], tokens[30 + n])) for n in range(8)])
    layout = layout.to(torch.device("cuda"))
    module: Any = SimpleNamespace(num_key_value_groups=4 // kv_heads, is_causal=True, training=True)
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, layout.ids.shape[1], 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    assert attention.kernel_for(inputs[0][0].transpose(0, 1), 0.0) is attention.flash
    found = []
    for kernel in (attention.flash, attention.sdpa):
        monkeypatch.setattr(attention, "kernel_for", lambda *args, kernel=kernel: kernel)
        out, _ = attention._attention(module, *inputs, None, layout=layout, scaling=0.1)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
