"""Whole phases through Ray Train: two gloo workers with ZeRO-3 on the tiny policy."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from train_data import OFTEN_SAVED, ROWS, TASK_PROMPT, TWO_WORKERS, pairs, run, settings, sft_rows

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.folder import StorageError
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train import TrainError, TrainResult

pytestmark = [pytest.mark.ray, pytest.mark.engine]


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder, tiny_models / "policy", TWO_WORKERS)


def test_dpo_learns_and_its_curve_is_stored(trained: tuple[Path, TrainResult]):
    folder, result = trained
    curve = RunDir(folder).metrics("dpo")
    assert [line["step"] for line in curve] == list(range(1, 13))
    assert [line["rows"] for line in curve] == [8, 8, 3] * 4
    assert curve[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert curve[-2]["loss"] < 0.3
    assert curve[-2]["accuracy"] == 1
    assert curve[-2]["chosen_reward"] > curve[-2]["rejected_reward"]
    assert result.metrics["loss"] == curve[-1]["loss"]
    assert (result.steps, result.rows, result.trained, result.warnings) == (12, 19, True, ())
    # Evaluated every 4 steps, with every checkpoint (every 3), and at the end.
    evaluated = {line["step"]: line["eval_loss"] for line in curve if "eval_loss" in line}
    assert list(evaluated) == [3, 4, 6, 8, 9, 12]
    assert evaluated[12] < evaluated[3] < 0.7
    assert curve[-1]["eval_accuracy"] == 1
    assert list((folder / "metrics/tensorboard/dpo").glob("events*"))


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
    marker = json.loads((folder / "vpo.json").read_text("utf-8"))
    assert (marker["phase"], marker["fingerprint"], marker["steps"]) == ("dpo", "0123456789abcdef", 12)
    assert "0123456789abcdef" in (folder / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_one_worker_gives_the_same_losses_and_weights_as_two(
    trained: tuple[Path, TrainResult], make_worker: Any
):
    """One worker with batches of 8, without ZeRO, and two with 4 each; the last batch of 3 is uneven."""
    folder, _ = trained
    held_out = {"pair-00", "pair-01", "pair-09", "pair-19"}
    rows = [row for row in pairs(ROWS) if row["pair_id"] not in held_out]
    chosen = settings(epochs=4, global_batch=8, micro_batch=8, lr=3e-4, zero_stage=0)
    worker = make_worker("dpo", rows, chosen, seed=5)
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
    again = run(folder, tiny_models / "policy", TWO_WORKERS, rows=pairs(ROWS)[::-1])
    assert not again.trained
    assert (again.steps, again.metrics, again.rows) == (result.steps, result.metrics, result.rows)
    assert (folder / "policy" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.slow
def test_a_killed_driver_and_then_a_killed_worker_end_with_the_same_weights(
    trained: tuple[Path, TrainResult], tiny_models: Path, tmp_path: Path
):
    import ray

    script, address = Path(__file__).with_name("driver.py"), ray.get_runtime_context().gcs_address
    command = [sys.executable, str(script), address, str(tiny_models / "policy"), str(tmp_path)]
    with open(tmp_path / "driver.log", "wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: list((tmp_path / "checkpoints").glob("dpo-*/step-000002")), driver)
        driver.kill()
        kill_workers()  # before they notice and end by themselves
        driver.wait(timeout=30)
    assert not (tmp_path / "policy").exists(), (tmp_path / "driver.log").read_text("utf-8")

    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: latest_checkpoint(tmp_path) >= "step-000006")
        killed.extend(kill_workers(1))

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = run(tmp_path, tiny_models / "policy", OFTEN_SAVED)
    killer.join()
    assert killed
    assert json.loads((tmp_path / "policy" / "vpo.json").read_text("utf-8"))["resumed_after"] >= 6
    assert result.steps == 12
    undisturbed, disturbed = (f / "policy" / "model.safetensors" for f in (trained[0], tmp_path))
    assert disturbed.read_bytes() == undisturbed.read_bytes()
    curves = [RunDir(folder).metrics("dpo") for folder in (tmp_path, trained[0])]
    for ours, theirs in zip(*curves, strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])
    assert curves[0][-1]["eval_loss"] == curves[1][-1]["eval_loss"]
    assert not list((tmp_path / "checkpoints").glob("dpo-*"))


@pytest.mark.slow
def test_a_loss_that_explodes_keeps_the_checkpoint_which_other_workers_refuse(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
):
    """One row on two workers, too: fewer rows than workers train all the same."""
    values = {"epochs": 9, "lr": 1e30, "schedule": "constant", "warmup_ratio": 0, "save_steps": 1}
    chosen = settings(**values, zero_stage=2, workers=2)
    with pytest.raises(TrainError, match=r"is not a finite number in step 2.* query-00"):
        run(tmp_path, tiny_models / "policy", chosen, "sft", sft_rows(1))
    assert not (tmp_path / "policy").exists()
    stopped = RunDir(tmp_path).read_json("metrics/sft-stopped.json")
    [row] = stopped["rows"]
    assert stopped["step"] == 2
    assert row.startswith("query-00-")
    assert [path.name for path in (tmp_path / "checkpoints").glob("sft-*/step-*")] == ["step-000001"]
    alone = settings(**values, zero_stage=2, workers=1)
    with pytest.raises(TrainError, match=r"step 1 was written by 2 workers, this run has 1.*workers to 2"):
        run(tmp_path, tiny_models / "policy", alone, "sft", sft_rows(1))


@pytest.mark.slow
def test_early_stopping_exports_the_best_of_its_evaluations(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
):
    """SFT of LoRA adapters with ZeRO-3 at a rate at which the held-out loss soon grows again."""
    import torch
    from transformers import AutoModelForCausalLM

    chosen = settings(
        epochs=40,
        lr=0.05,
        schedule="constant",
        warmup_ratio=0,
        zero_stage=3,
        workers=2,
        lora={"r": 4, "alpha": 8},
        evaluate={"share": 0.12, "steps": 1, "patience": 2, "export": "best"},
    )
    rows = sft_rows(ROWS)
    result = run(tmp_path, tiny_models / "policy", chosen, "sft", rows)
    curve = RunDir(tmp_path).metrics("sft")
    losses = [line["eval_loss"] for line in curve]
    top = losses.index(min(losses))
    assert len(losses) == result.steps == top + 3 < 40 * 3
    facts = json.loads((tmp_path / "policy" / "vpo.json").read_text("utf-8"))
    assert (facts["exported_step"], facts["metrics"]["eval_loss"]) == (top + 1, losses[top])

    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    held_out = [row for row in rows if row["query_id"] in {f"query-{n:02}" for n in (0, 1, 9, 19)}]
    from vpo_ray.train.examples import tokenise

    total, count = 0.0, 0
    for example in tokenise("sft", held_out, tokenizer, TASK_PROMPT, 1024)[0]:
        prompt, response = example.prompt.tolist(), example.responses[0].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    assert total / count == pytest.approx(losses[top], rel=1e-4)


@pytest.mark.slow
def test_of_equal_evaluations_the_first_is_exported_though_more_follow_than_are_kept(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
):
    chosen = settings(
        epochs=6,
        lr=1e-3,
        schedule="constant",
        evaluate={"share": 0.12, "steps": 1, "metric": "accuracy", "export": "best"},
        save_steps=1,
        keep_checkpoints=2,
    )
    run(tmp_path, tiny_models / "policy", chosen)
    found = [line["eval_accuracy"] for line in RunDir(tmp_path).metrics("dpo")]
    assert found.count(max(found)) > 3
    facts = json.loads((tmp_path / "policy" / "vpo.json").read_text("utf-8"))
    assert facts["exported_step"] == found.index(max(found)) + 1


@pytest.mark.slow
def test_a_preemption_notice_saves_a_checkpoint_and_training_goes_on(tiny_models: Path, tmp_path: Path):
    script = Path(__file__).with_name("preempted.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_models / "policy"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == 240
    [name] = told["seen"]
    assert 1 <= int(name.removeprefix("step-")) < 240
    assert (tmp_path / "policy/vpo.json").is_file()


def test_what_cannot_be_trained_is_refused_before_a_worker_starts(tiny_models: Path, tmp_path: Path):
    conflict = settings(deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}})
    with pytest.raises(
        TrainError, match=r"deepspeed\.zero_optimization\.stage is 1.*zero_stage of the recipe"
    ):
        run(tmp_path, tiny_models / "policy", conflict)
    with pytest.raises(TrainError, match="the table is empty"):
        run(tmp_path, tiny_models / "policy", TWO_WORKERS, rows=[])
    table = RunDir(tmp_path).table("sft")
    table.append(sft_rows(2))
    with pytest.raises(StorageError, match="holds a part of another table: no pair_id"):
        run(tmp_path, tiny_models / "policy", TWO_WORKERS, rows=table.uri)
    with pytest.raises(TrainError, match="leaves no row of 1 to train on"):
        run(tmp_path, tiny_models / "policy", TWO_WORKERS, rows=pairs(1))


def wait_for(condition: Callable[[], Any], process: Any = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, "the driver has ended"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def latest_checkpoint(folder: Path) -> str:
    """Name of the checkpoint that a restart would take, "" for none."""
    found = list((folder / "checkpoints").glob("dpo-*/checkpoint_manager_snapshot.json"))
    try:
        state = json.loads(found[0].read_text("utf-8")) if found else {}
    except ValueError:  # it is being written
        return ""
    return (state.get("latest_checkpoint_result") or {}).get("checkpoint_dir_name", "")


def kill_workers(at_most: int = 9) -> list[int]:
    """SIGKILL training workers of this cluster; their process ids."""
    import ray

    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    killed: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text("utf-8").rpartition(")")[2].split()[1])
            worker = b"ray::RayTrainWorker" in (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if parent == raylet and worker and len(killed) < at_most:
            os.kill(int(process.name), signal.SIGKILL)
            killed.append(int(process.name))
    return killed
