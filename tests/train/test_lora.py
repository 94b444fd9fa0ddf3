"""LoRA: only adapters are trained, under every ZeRO stage, and what is exported is what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import FACTS, pairs, settings

from vpo_ray.recipe import TrainLora
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train import TrainError, checkpoints
from vpo_ray.train.model_files import refuse_adapter
from vpo_ray.train.packing import pack
from vpo_ray.train.save_pretrained import export_policy
from vpo_ray.train.zero import full_weights

pytestmark = pytest.mark.engine


def lora(stage: int = 0, merge: bool = True, **changes: Any) -> Any:
    chosen = TrainLora(r=4, alpha=8, merge=merge)
    return settings(global_batch=3, epochs=2, lr=3e-3, zero_stage=stage, lora=chosen, **changes)


@pytest.fixture(scope="module")
def curves() -> dict[int, list[Row]]:
    return {}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_learn_alike_under_every_zero_stage(
    make_worker: Any,
    curves: dict[int, list[Row]],
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed reads it in every step of ZeRO-3
    worker = make_worker("dpo", pairs(6), lora(stage))
    trained = [name for name, p in worker.engine.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    curves[stage] = [worker.step(step) for step in range(2)]
    checkpoint = {"tag": checkpoints.TAG, "exclude_frozen_parameters": True}
    worker.engine.save_checkpoint(str(tmp_path / "checkpoint"), **checkpoint)
    curves[stage] += [worker.step(step) for step in range(2, 4)]
    # Adapters start without effect: the policy is its own reference.
    assert curves[stage][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert curves[stage][-1]["loss"] < 0.68
    if stage:
        if 0 not in curves:  # the tests come in any order
            plainly = make_worker("dpo", pairs(6), lora(0))
            curves[0] = [plainly.step(step) for step in range(4)]
        for ours, plain in zip(curves[stage], curves[0], strict=True):
            for name in ("loss", "grad_norm", "chosen_logp"):
                assert ours[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-5)
    # A checkpoint holds the adapters alone; with it a new worker goes on as if nothing had been.
    frozen = sum(p.ds_numel if stage == 3 else p.numel() for p in worker.engine.module.parameters())
    assert sum(f.stat().st_size for f in (tmp_path / "checkpoint").rglob("*.pt")) < frozen * 4 / 2
    again = make_worker("dpo", pairs(6), lora(stage))
    checkpoints.load_shard(again, str(tmp_path / "checkpoint"))
    for step in (2, 3):
        assert again.step(step)["loss"] == pytest.approx(curves[stage][step]["loss"], rel=1e-6)


@pytest.mark.parametrize("merge", [True, False])
def test_the_export_gives_the_trained_log_probabilities(make_worker: Any, tmp_path: Path, merge: bool):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    worker = make_worker("dpo", pairs(6), lora(merge=merge))
    for step in range(4):
        worker.step(step)
    weights = full_weights(worker.engine, 0, trained_only=True)
    export_policy(worker.engine.module.model, weights, worker.job, FACTS)
    folder = tmp_path / "out"
    load = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    loaded = load.from_pretrained(folder, dtype=torch.float32)
    example = worker.job.examples[0]
    ids = torch.tensor([[*example.prompt.tolist(), *example.responses[0].tolist()]])
    with torch.no_grad():
        logps = loaded(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
        worker.engine.eval()
        expected = worker.engine(pack([example]))[: len(example.responses[0])]
    actual = logps.gather(1, torch.from_numpy(example.responses[0]).long()[:, None])[:, 0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    card = (folder / "README.md").read_text("utf-8")
    assert "LoRA adapters (rank 4" in card
    assert (folder / "generation_config.json").is_file()
    if merge:
        assert not (folder / "adapter_config.json").exists()
        refuse_adapter(str(folder))
    else:
        assert not list(folder.glob("model*.safetensors"))
        with pytest.raises(TrainError, match=r"is a LoRA adapter.*lora\.merge true"):
            refuse_adapter(str(folder))


@pytest.mark.parametrize(
    ("targets", "message"), [(["no_such_layer"], "not found"), (["lm_head"], "output embedding")]
)
def test_wrong_targets_are_named(make_worker: Any, targets: list[str], message: str):
    wrong = settings(lora=TrainLora(target_modules=targets))
    with pytest.raises(TrainError, match=message):
        make_worker("dpo", pairs(1), wrong)


def test_references_are_those_of_the_base_model(make_worker: Any, tmp_path: Path):
    adapted = make_worker("dpo", pairs(3), lora()).reference
    plain = make_worker("dpo", pairs(3), settings()).reference
    assert (adapted == plain).all()
    assert RunDir(tmp_path).exists("checkpoints/reference/test")
