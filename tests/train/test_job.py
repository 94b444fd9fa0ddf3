"""Whole phases through Ray Train: two gloo workers with ZeRO-3 on the tiny policy."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from train_data import TASK_PROMPT, pairs, settings, sft_rows

from vpo_ray.policy_prompt import load_tokenizer
from vpo_ray.storage import RunDir
from vpo_ray.train import TrainError, TrainResult, train

pytestmark = [pytest.mark.ray, pytest.mark.engine]

TWO_WORKERS = settings(
    epochs=4, global_batch=5, micro_batch=2, lr=3e-4, zero_stage=3, workers=2, save_steps=3, max_failures=2
)


def run(
    folder: Path, model: Path, phase: str = "dpo", rows: Any = None, chosen: Any = TWO_WORKERS
) -> TrainResult:
    return train(
        phase,
        chosen,
        model=str(model),
        rows=pairs(11) if rows is None else rows,
        task_prompt=TASK_PROMPT,
        out=str(folder / "policy"),
        run_uri=str(folder),
        seed=5,
        fingerprint="0123456789abcdef",
    )


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, tiny_models / "policy")


def test_dpo_learns_and_its_curve_is_stored(trained: tuple[Path, TrainResult]):
    folder, result = trained
    curve = RunDir(folder).metrics("dpo")
    assert [line["step"] for line in curve] == list(range(1, 13))
    assert [line["rows"] for line in curve] == [5, 5, 1] * 4
    assert curve[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert curve[-2]["loss"] < 0.3
    assert curve[-2]["accuracy"] == 1
    assert curve[-2]["chosen_reward"] > curve[-2]["rejected_reward"]
    assert result.metrics["loss"] == curve[-1]["loss"]
    assert (result.steps, result.rows, result.trained) == (12, 11, True)


def test_the_export_is_a_plain_hugging_face_folder(trained: tuple[Path, TrainResult]):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained[0] / "policy"
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.float32
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a dog"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert "User request: a dog" in tokenizer.decode(ids["input_ids"][0])
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    assert load_tokenizer(str(folder)).chat_template == load_tokenizer(str(folder), TASK_PROMPT).chat_template
    marker = json.loads((folder / "vpo.json").read_text())
    assert (marker["phase"], marker["fingerprint"], marker["steps"]) == ("dpo", "0123456789abcdef", 12)
    assert "0123456789abcdef" in (folder / "README.md").read_text()


def test_one_worker_gives_the_same_losses_and_weights_as_two(
    trained: tuple[Path, TrainResult], make_worker: Any
):
    folder, _ = trained
    worker = make_worker(
        "dpo", pairs(11), settings(epochs=4, global_batch=5, micro_batch=5, lr=3e-4, zero_stage=0), seed=5
    )
    curve = [worker.step(step) for step in range(12)]
    for alone, together in zip(curve, RunDir(folder).metrics("dpo"), strict=True):
        for name in ("loss", "grad_norm", "lr", "margin", "tokens"):
            assert alone[name] == pytest.approx(together[name], rel=1e-4, abs=1e-5), (alone["step"], name)
    exported = load_file(folder / "policy" / "model.safetensors")
    for name, parameter in worker.engine.module.model.named_parameters():
        assert (parameter - exported[name]).abs().max() < 1e-4, name


def test_a_second_run_trains_nothing(trained: tuple[Path, TrainResult], tiny_models: Path):
    folder, result = trained
    before = (folder / "policy" / "model.safetensors").stat()
    again = run(folder, tiny_models / "policy", rows=pairs(11)[::-1])
    assert not again.trained
    assert (again.steps, again.metrics, again.rows) == (result.steps, result.metrics, result.rows)
    assert (folder / "policy" / "model.safetensors").stat() == before


def test_a_killed_worker_goes_on_from_its_checkpoint_to_the_same_weights(
    trained: tuple[Path, TrainResult], tiny_models: Path, tmp_path: Path
):
    killed: list[int] = []
    killer = threading.Thread(target=_kill_worker_after_checkpoint, args=(tmp_path, killed.append))
    killer.start()
    result = run(tmp_path, tiny_models / "policy")
    killer.join()
    assert killed
    assert json.loads((tmp_path / "policy" / "vpo.json").read_text())["resumed_after"] >= 3
    assert result.steps == 12
    undisturbed, disturbed = (f / "policy" / "model.safetensors" for f in (trained[0], tmp_path))
    assert disturbed.read_bytes() == undisturbed.read_bytes()
    assert [line["loss"] for line in RunDir(tmp_path).metrics("dpo")] == [
        line["loss"] for line in RunDir(trained[0]).metrics("dpo")
    ]
    assert not list((tmp_path / "checkpoints").glob("dpo-*"))


def test_fewer_rows_than_workers_and_a_loss_that_explodes(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
):
    chosen = settings(epochs=9, lr=1e30, schedule="constant", warmup_ratio=0, zero_stage=2, workers=2)
    with pytest.raises(TrainError, match=r"is not a finite number in step .* query-00"):
        run(tmp_path, tiny_models / "policy", "sft", sft_rows(1), chosen)
    assert not (tmp_path / "policy").exists()


def test_what_cannot_be_trained_is_refused_before_a_worker_starts(tiny_models: Path, tmp_path: Path):
    conflict = settings(deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}})
    with pytest.raises(
        TrainError, match=r"deepspeed\.zero_optimization\.stage is 1.*zero_stage of the recipe"
    ):
        run(tmp_path, tiny_models / "policy", chosen=conflict)
    with pytest.raises(TrainError, match="the table is empty"):
        run(tmp_path, tiny_models / "policy", rows=[])


def _kill_worker_after_checkpoint(folder: Path, report: Callable[[int], None]) -> None:
    """SIGKILL one of this cluster's training workers while the second checkpoint is uploaded."""
    import ray

    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list((folder / "checkpoints").glob("dpo-*/step-000006")):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    worker = b"ray::RayTrainWorker" in (process / "cmdline").read_bytes()
                except OSError:  # it has ended meanwhile
                    continue
                if parent == raylet and worker:
                    os.kill(int(process.name), signal.SIGKILL)
                    report(int(process.name))
                    return
        time.sleep(0.005)
