"""Group-relative learning: its loss by hand, and the same numbers as TRL's GRPO trainer, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import ANIMALS, settings

from vpo_ray.recipe import Rl
from vpo_ray.records import Row
from vpo_ray.train.examples import TrainError, tokenise
from vpo_ray.train.losses import RL_METRICS, rl_loss
from vpo_ray.train.packing import pack

GROUPS, SIZE = 3, 4


def groups(count: int = GROUPS, size: int = SIZE) -> list[Row]:
    """Groups whose prompts have different lengths; advantages sum to 0."""
    return [
        {
            "group_id": f"group-{n:02}",
            "query_id": f"query-{n:02}",
            "query": f"a {ANIMALS[n % len(ANIMALS)]} runs" + " and rests" * (n % 3),
            "prompts": [f"A {ANIMALS[n]} runs" + " over green grass" * k + "." for k in range(size)],
            "advantages": [float(k - (size - 1) / 2) for k in range(size)],
        }
        for n in range(count)
    ]


def rl(**changes: Any) -> Rl:
    """The shared settings, without what only DPO has."""
    common = settings().model_dump(include=set(Rl.model_fields), exclude={"reference", "beta", "evaluate"})
    return Rl(**(common | changes))


def by_hand(token_logps, sampled, reference, lengths, advantages, chosen) -> float:
    """The sum of losses, token by token in plain Python."""
    total, at = 0.0, 0
    for length, advantage in zip(lengths, advantages, strict=True):
        tokens = range(at, at + length)
        logs = [float(token_logps[t] - sampled[t]) for t in tokens]
        if chosen.ratio == "response":
            logs = [sum(logs) / length] * length
        losses = []
        for t, log in zip(tokens, logs, strict=True):
            ratio = torch.tensor(log).exp().item()
            held = min(max(ratio, 1 - chosen.clip), 1 + chosen.clip_high)
            behind = float(reference[t] - token_logps[t])
            kl = torch.tensor(behind).exp().item() - behind - 1
            losses.append(-min(ratio * advantage, held * advantage) + chosen.beta * kl)
        share = {"response": length, "token": 1, "constant": chosen.length}[chosen.aggregate]
        total += sum(losses) / share
        at += length
    return total


@pytest.mark.parametrize("aggregate", ["response", "token", "constant"])
@pytest.mark.parametrize("ratio", ["token", "response"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_loss_is_its_formula(aggregate: str, ratio: str, beta: float) -> None:
    chosen = rl(
        aggregate=aggregate,
        ratio=ratio,
        beta=beta,
        clip=0.1,
        clip_high=0.3,
        **({"length": 7} if aggregate == "constant" else {}),
    )
    torch.manual_seed(1)
    lengths, advantages = (4, 2, 5), [1.5, -0.5, -1.0]
    token_logps, sampled, reference = (-torch.rand(11) * 2 for _ in range(3))
    loss, metrics = rl_loss(token_logps, sampled, reference, lengths, torch.tensor(advantages), chosen)
    expected = by_hand(token_logps, sampled, reference, lengths, advantages, chosen)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = dict(zip(RL_METRICS, metrics.tolist(), strict=True))
    assert found["kl"] > 0
    assert found["clipped"] > 0 or ratio == "response"


def test_where_the_policy_is_the_one_that_sampled_it_is_plain_policy_gradient() -> None:
    token_logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    same = token_logps.detach()
    loss, metrics = rl_loss(token_logps, same, same, (2, 1), torch.tensor([2.0, -1.0]), rl())
    loss.backward()
    assert loss.item() == pytest.approx(-(2.0 + 2.0 - 1.0))
    assert token_logps.grad.tolist() == [-2.0, -2.0, 1.0]
    assert dict(zip(RL_METRICS, metrics.tolist(), strict=True)) == {"kl": 0, "ratio": 3, "clipped": 0}


@pytest.mark.engine
@pytest.mark.parametrize(
    "change",
    [{"prompts": ["one"]}, {"advantages": ["1", "2"]}, {"prompts": None}, {"query": 3}, {"group_id": None}],
)
def test_a_row_that_is_no_group_is_refused(make_worker: Any, change: Row) -> None:
    worker = make_worker("rl", groups(), rl())
    with pytest.raises(TrainError, match="an rl row has no"):
        tokenise("rl", [groups(1)[0] | change], worker.job.tokenizer, worker.job.task_prompt, 1024)


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"aggregate": "response"}, {"loss_type": "grpo"}),
        ({"aggregate": "token", "clip_high": 0.28}, {"loss_type": "bnpo", "epsilon_high": 0.28}),
        ({"aggregate": "constant", "length": 64}, {"loss_type": "dr_grpo", "max_completion_length": 64}),
        ({"aggregate": "response", "ratio": "response", "beta": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    ],
)
def test_losses_and_gradients_equal_trl(
    make_worker: Any, tiny_models: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    worker = make_worker("rl", groups(), rl(**ours))
    examples = worker.job.examples
    torch.manual_seed(3)
    noise = [torch.randn(e.response_tokens) * 0.2 for e in examples]
    worker.sampled = worker.reference + torch.cat(noise).numpy()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_models / "policy", dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            num_generations=SIZE,
            per_device_train_batch_size=SIZE,
            importance_sampling_level="sequence" if ours.get("ratio") == "response" else "token",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            **theirs,
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_models / "policy"),
        train_dataset=Dataset.from_list([{"prompt": "a dog"}]),
    )
    trainer.current_gradient_accumulation_steps = 1  # which its training loop sets
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, _as_trl_has_it(examples, worker))
    loss.backward()

    worker.engine.train()
    rows = list(range(GROUPS))
    mine = worker._loss(rows)[0] / worker._items(rows)
    worker.engine.backward(mine)
    torch.testing.assert_close(mine.item(), loss.item(), rtol=1e-5, atol=1e-6)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in worker.engine.module.model.named_parameters():
        scale = gradients[name].grad.abs().max()
        torch.testing.assert_close(
            parameter.grad / scale, gradients[name].grad / scale, rtol=1e-4, atol=2e-5, msg=name
        )


def _as_trl_has_it(examples: Any, worker: Any) -> dict[str, torch.Tensor]:
    """Padded tensors: prompts on the left, completions on the right."""
    responses = [(e, r, a) for e in examples for r, a in zip(e.responses, e.advantages, strict=True)]
    before, after = max(len(e.prompt) for e in examples), max(len(r) for _, r, _ in responses)
    shape = len(responses)
    out = {
        "prompt_ids": torch.zeros(shape, before, dtype=torch.long),
        "prompt_mask": torch.zeros(shape, before, dtype=torch.long),
        "completion_ids": torch.zeros(shape, after, dtype=torch.long),
        "completion_mask": torch.zeros(shape, after, dtype=torch.long),
        "old_per_token_logps": torch.zeros(shape, after),
        "ref_per_token_logps": torch.zeros(shape, after),
        "advantages": torch.tensor([a for *_, a in responses]),
    }
    lengths = [len(r) for _, r, _ in responses]
    tables = [torch.from_numpy(t).split(lengths) for t in (worker.sampled, worker.reference)]
    for n, (example, response, _) in enumerate(responses):
        prompt = torch.from_numpy(example.prompt.astype("int64"))
        out["prompt_ids"][n, before - len(prompt) :] = prompt
        out["prompt_mask"][n, before - len(prompt) :] = 1
        out["completion_ids"][n, : len(response)] = torch.from_numpy(response.astype("int64"))
        out["completion_mask"][n, : len(response)] = 1
        for name, table in zip(("old_per_token_logps", "ref_per_token_logps"), tables, strict=True):
            out[name][n, : len(response)] = table[n]
    return out


@pytest.mark.engine
def test_what_was_better_becomes_more_likely(make_worker: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    worker = make_worker("rl", groups(), rl(epochs=8, global_batch=2, micro_batch=1, lr=3e-4, beta=0.01))
    first = worker.step(0)
    assert first["loss"] == pytest.approx(0, abs=0.5)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["ratio"] == pytest.approx(1, abs=1e-4)
    curve = [worker.step(step) for step in range(1, 16)]
    assert curve[-1]["kl"] > 0
    with torch.no_grad():
        now = worker.engine.module(pack(worker.job.examples))
    gains = (now - torch.from_numpy(worker.sampled)).split(
        [len(r) for e in worker.job.examples for r in e.responses]
    )
    best, worst = (sum(gains[g * SIZE + k].sum() for g in range(GROUPS)) for k in (SIZE - 1, 0))
    assert best > worst
