"""The same numbers as TRL 1.16 on the same policy and rows, in float32.

Warm-up is left out: transformers' first step has a learning rate of 0, ours trains (test_schedule).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import pairs, settings, sft_rows

from vpo_ray.train.losses import DPO_METRICS, dpo_loss

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

STEPS = 30
ROWS = 4
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": ROWS,
    "max_steps": STEPS,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
OURS: dict[str, Any] = {
    "epochs": STEPS,
    "global_batch": ROWS,
    "micro_batch": 2,
    "lr": 3e-4,
    "schedule": "cosine",
    "warmup_ratio": 0,
    "clip_grad_norm": 0.5,
}


def close(ours: Any, theirs: Any, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours).double(),
        torch.as_tensor(theirs).double(),
        rtol=1e-4,
        atol=2e-5,
        msg=lambda m: f"{what}: {m}",
    )


def compare_training(worker: Any, trainer: Any, metrics: dict[str, str]) -> None:
    """The gradients of the first batch, the curve, and the weights at the end."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs, num_items_in_batch=None).backward()
    rows = list(range(ROWS))
    items = ROWS if worker.job.phase == "dpo" else sum(e.response_tokens for e in worker.job.examples)
    worker.engine.train()
    worker.engine.backward(worker._loss(rows)[0] / items)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in worker.engine.module.model.named_parameters():
        scale = theirs[name].grad.abs().max()
        close(parameter.grad / scale, theirs[name].grad / scale, f"gradient of {name}")
    trainer.model.zero_grad()
    worker.engine.zero_grad()

    curve = [worker.step(step) for step in range(STEPS)]
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    for ours, theirs_name in metrics.items():
        pairs_of_lines = list(zip(curve, log, strict=True))
        if ours == "accuracy":  # until the weights change, TRL's says how rounding errors fell
            pairs_of_lines = [(line, other) for line, other in pairs_of_lines if line["margin"] > 0.01]
            assert len(pairs_of_lines) > STEPS / 2
        close([line[ours] for line, _ in pairs_of_lines], [x[theirs_name] for _, x in pairs_of_lines], ours)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in worker.engine.module.model.named_parameters():
        assert (parameter - theirs[name]).abs().max() < 1e-4, name


def test_dpo_equals_trl(make_worker: Any, tiny_models: Path, tmp_path: Path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes rows that are tokens already: the tokenisation is not what is compared."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    worker = make_worker("dpo", pairs(ROWS), settings(**OURS))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        dict(zip(names, [e.prompt.tolist(), *(r.tolist() for r in e.responses)], strict=True))
        for e in worker.job.examples
    ]
    model = tiny_models / "policy"
    trainer = Tokenised(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.1,
            max_length=None,
            precompute_ref_log_probs=True,
            remove_unused_columns=False,
            **COMMON,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
    )
    reference = trainer.train_dataset
    close(worker.reference[:, 0], reference["ref_chosen_logps"][:], "log-probabilities of chosen")
    close(worker.reference[:, 1], reference["ref_rejected_logps"][:], "log-probabilities of rejected")
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "lr": "learning_rate",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_logp": "logps/chosen",
        "rejected_logp": "logps/rejected",
    }
    compare_training(worker, trainer, names)


def test_sft_equals_trl(make_worker: Any, tiny_models: Path, tmp_path: Path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    worker = make_worker("sft", sft_rows(ROWS), settings(**OURS))
    rows = [
        {
            "input_ids": [*e.prompt.tolist(), *e.responses[0].tolist()],
            "completion_mask": [0] * len(e.prompt) + [1] * len(e.responses[0]),
        }
        for e in worker.job.examples
    ]
    model = tiny_models / "policy"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), max_length=None, completion_only_loss=True, **COMMON
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
    )
    compare_training(worker, trainer, {"loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # by hand for delta = 2.0 in 4 and 2 tokens each: ratios chosen 1.5, rejected -0.5
        ({}, -torch.nn.functional.logsigmoid(torch.tensor(0.2))),
        (
            {"label_smoothing": 0.25},
            0.75 * torch.tensor(0.2).neg().exp().log1p() + 0.25 * torch.tensor(0.2).exp().log1p(),
        ),
        ({"length_normalise": True}, torch.tensor(0.1 * (1.5 / 4 + 0.5 / 2)).neg().exp().log1p()),
        ({"loss": "ipo"}, (torch.tensor(1.5 / 4 + 0.5 / 2) - 5.0) ** 2),
        ({"rpo_alpha": 2.0}, -torch.nn.functional.logsigmoid(torch.tensor(0.2)) + 2.0 * 8.5 / 4),
    ],
)
def test_the_options_of_dpo_are_their_formulas(changes: dict[str, Any], expected: torch.Tensor):
    token_logps = torch.tensor([-4.0, -3.0, -1.0, -0.5, -2.5, -2.0])
    loss, metrics = dpo_loss(token_logps, torch.tensor([-10.0, -4.0]), (4, 2), settings(beta=0.1, **changes))
    torch.testing.assert_close(loss, expected)
    found = dict(zip(DPO_METRICS, metrics.tolist(), strict=True))
    assert (found["accuracy"], found["chosen_logp"], found["rejected_logp"]) == (1, -8.5, -4.5)
    assert found["end_logp"] == -0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"length_normalise": True}, {"loss": "ipo"}])
def test_a_tie_and_the_signs_of_rounding_errors_are_no_wins(dtype: str, changes: dict[str, Any]):
    lengths, eps = (200, 100), torch.finfo(getattr(torch, dtype)).eps
    token_logps = torch.full((300,), -2.0)

    def accuracy(nats: float) -> float:
        reference = torch.tensor([-400.0 - nats, -200.0])
        metrics = dpo_loss(token_logps, reference, lengths, settings(dtype=dtype, **changes))[1]
        return dict(zip(DPO_METRICS, metrics.tolist(), strict=True))["accuracy"]

    assert [accuracy(nats) for nats in (0, 400 * 2**-23, 5 * eps, -5 * eps, -1)] == [0] * 5
    assert accuracy(1) == 1
    if dtype == "float32":
        assert accuracy(1e-3) == 1
