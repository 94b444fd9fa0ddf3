import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import pairs, settings

from vpo_ray.train import policy, zero
from vpo_ray.train.examples import TrainError
from vpo_ray.train.packing import pack

pytestmark = pytest.mark.engine


def test_packing_gives_the_models_own_log_probabilities(make_worker: Any):
    worker = make_worker("dpo", pairs(5), settings())
    examples = worker.job.examples
    module = worker.engine.module
    with torch.no_grad():
        shared = module(pack(examples))
        unshared = module(pack(examples, share=False))
        alone = torch.cat([module(pack([e])) for e in examples])
    policy.check_packing(module, examples[2], torch.device("cpu"), 1e-4)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(shared, unshared, rtol=0, atol=1e-4)


def test_a_model_that_packing_would_get_wrong_is_refused(make_worker: Any):
    worker = make_worker("dpo", pairs(1), settings())
    inner = worker.engine.module.model
    original = type(inner).forward

    def capped(**inputs: Any) -> Any:
        output = original(inner, **inputs)
        output.logits = torch.tanh(output.logits)
        return output

    inner.forward = capped
    with pytest.raises(TrainError, match="when packed"):
        policy.check_packing(worker.engine.module, worker.job.examples[0], torch.device("cpu"), 1e-3)


def test_weights_of_another_model_are_refused(process_group: None, tiny_models: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for name in ("renamed", "resized"):
        shutil.copytree(tiny_models / "policy", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        key = next(key for key in weights if "q_proj" in key)
        tensor = weights.pop(key)
        weights.update({f"other.{key}": tensor} if name == "renamed" else {key: torch.cat([tensor, tensor])})
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        with pytest.raises(TrainError, match=r"not those of its config.json.*q_proj"):
            zero.load_model(str(tmp_path / name), settings(), {}, None, False)
    with pytest.raises(TrainError, match="is not a causal language model"):
        zero.load_model(str(tiny_models / "video/text_encoder"), settings(), {}, None, False)


@pytest.mark.parametrize(("chunk", "keep"), [(2**26, 2**26), (7 * 50, 2**26), (7 * 50, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_in_chunks_equals_log_softmax(monkeypatch: Any, chunk: int, keep: int, bias: bool):
    monkeypatch.setattr(policy, "CHUNK", chunk)
    monkeypatch.setattr(policy, "KEEP", keep)
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 50, bias=bias)
    head = policy.ResponseHead.of(plain)
    hidden = torch.randn(23, 16, requires_grad=True)
    targets, weights = torch.randint(50, (23,)), torch.randn(23)

    expected = plain(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, *plain.parameters()])
    actual = head(hidden, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), [hidden, *head.parameters()]), wanted
    )


def test_the_head_multiplies_in_the_dtype_of_its_input(monkeypatch: Any):
    torch.manual_seed(0)
    head = policy.ResponseHead.of(torch.nn.Linear(16, 50, bias=False))
    hidden = torch.randn(23, 16)
    targets, weights = torch.randint(50, (23,)), torch.randn(23)
    wide = torch.autograd.grad((head(hidden, targets) * weights).sum(), head.weight)[0]
    narrow = hidden.bfloat16().requires_grad_()
    out = head(narrow, targets)
    d_hidden, d_weight = torch.autograd.grad((out * weights).sum(), [narrow, head.weight])
    assert (out.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(d_weight, wide, rtol=0.05, atol=0.05)


def test_autocast_narrows_products_and_nothing_that_is_kept(make_worker: Any, monkeypatch: Any):
    monkeypatch.setenv("LOCAL_RANK", "0")
    values = {"global_batch": 3, "epochs": 2, "micro_batch": 3, "zero_stage": 0, "dtype": "float32"}
    wide = make_worker("dpo", pairs(6), settings(**values))
    cast = make_worker("dpo", pairs(6), settings(**values, autocast="bfloat16"))
    examples = cast.job.examples
    policy.check_packing(cast.engine.module, examples[2], torch.device("cpu"), 0.1)
    assert not torch.equal(cast.engine.module(pack(examples)), wide.engine.module(pack(examples)))
    for step in range(3):
        expected, found = wide.step(step), cast.step(step)
        for name in ("loss", "chosen_logp", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=0.1, abs=0.02), (step, name)
    assert {p.dtype for p in cast.engine.module.parameters()} == {torch.float32}


def test_autocast_is_for_wider_weights() -> None:
    with pytest.raises(ValueError, match="autocast has no effect with dtype: bfloat16"):
        settings(dtype="bfloat16", autocast="auto")


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """The curve of a float32 run without ZeRO, made by the first test that needs it."""
    return []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_zero_stage_and_dtype_takes_the_same_steps(
    make_worker: Any, plain: list[Any], monkeypatch: Any, stage: int, dtype: str
):
    """Also with accumulation over packs and activation checkpointing. A norm of bf16 gradients is
    compared before the first update only: the weights behind it are rounded, and part."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    values = {"global_batch": 3, "epochs": 2}
    if not plain:
        worker = make_worker("dpo", pairs(6), settings(**values, micro_batch=3, zero_stage=0))
        plain += [worker.step(step) for step in range(4)]
    chosen = settings(**values, micro_batch=1, zero_stage=stage, dtype=dtype, activation_checkpointing=True)
    other = make_worker("dpo", pairs(6), chosen)
    rel = 1e-4 if dtype == "float32" else 0.2
    for step, expected in enumerate(plain):
        actual = other.step(step)
        norm = [] if dtype == "bfloat16" and step else ["grad_norm"]
        for name in ("loss", "chosen_logp", *norm):
            assert actual[name] == pytest.approx(expected[name], rel=rel, abs=rel / 10), (step, name)


@pytest.mark.slow
def test_an_optimizer_offloaded_to_the_cpu_takes_the_same_steps(make_worker: Any, monkeypatch: Any):
    monkeypatch.setenv("LOCAL_RANK", "0")
    plain = make_worker("dpo", pairs(4), settings(global_batch=2, epochs=2))
    offload = {"optimizer": "cpu", "parameters": "cpu"}
    other = make_worker("dpo", pairs(4), settings(global_batch=2, epochs=2, zero_stage=3, offload=offload))
    assert type(other.engine.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    for step in range(4):
        expected, actual = plain.step(step), other.step(step)
        for name in ("loss", "grad_norm", "chosen_logp"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (step, name)
