"""The learning rate of every step, and a phase whose steps have no effect."""

from typing import Any

import pytest
import torch
from train_data import pairs, settings, sft_rows

from vpo_ray.train import TrainError
from vpo_ray.train.worker import lr_factor
from vpo_ray.train.zero import bit_sums


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "ratio", "warmup"), [(1, 0.1, 1), (2, 0.5, 1), (20, 0.1, 2), (3, 1, 3)])
def test_step_i_of_w_of_the_warm_up_has_rate_i_of_w(schedule: str, steps: int, ratio: float, warmup: int):
    rates = [lr_factor(step, steps, schedule, ratio) for step in range(steps)]
    assert rates[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert min(rates) > 0
    assert lr_factor(0, steps, schedule, 0) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_behind_the_warm_up_it_is_as_in_transformers(schedule: str, warmup: int):
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(30):
        if step >= warmup:
            assert lr_factor(step, 30, schedule, warmup / 30) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.engine
@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_a_phase_of_one_step_trains(make_worker: Any, phase: Any):
    rows = pairs(4) if phase == "dpo" else sft_rows(4)
    worker = make_worker(phase, rows, settings())
    before = bit_sums(worker.engine)
    assert worker.job.steps == 1
    line = worker.step(0)
    assert line["lr"] == worker.job.settings.lr
    assert not torch.equal(bit_sums(worker.engine), before)


@pytest.mark.engine
@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 2}}, {"dtype": "bfloat16", "zero_stage": 2}])
def test_a_phase_that_changes_no_weight_is_not_exported(make_worker: Any, changes: dict[str, Any]):
    worker = make_worker("sft", sft_rows(4), settings(lr=1e-60, **changes))
    before = bit_sums(worker.engine)
    worker.curve = [worker.step(0)]
    with pytest.raises(TrainError, match=r"1 steps changed no weight.*learning rate \(1e-60\)"):
        worker._finish(before)
