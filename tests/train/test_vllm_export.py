"""What training exports gives the same first tokens in transformers and in vLLM."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import FACTS, settings, sft_rows

from vpo_ray.recipe import TrainLora
from vpo_ray.train.save_pretrained import export_policy
from vpo_ray.train.zero import full_weights

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def test_full_merged_and_adapter_exports_write_the_same_in_vllm(
    make_worker: Any, tiny_models: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    values = {"global_batch": 4, "epochs": 4, "lr": 3e-2, "schedule": "constant", "warmup_ratio": 0}
    full = make_worker("sft", sft_rows(4), settings(**values | {"lr": 3e-3}))
    lora = make_worker("sft", sft_rows(4), settings(**values, lora=TrainLora(r=8, alpha=16)))
    for step in range(4):
        full.step(step)
        lora.step(step)
    folders = {name: str(tmp_path / name) for name in ("full", "merged", "adapter")}
    export_policy(
        full.engine.module.model, full_weights(full.engine, 0), replace(full.job, out=folders["full"]), FACTS
    )
    weights = full_weights(lora.engine, 0, trained_only=True)
    for name in ("merged", "adapter"):
        chosen = settings(**values, lora=TrainLora(r=8, alpha=16, merge=name == "merged"))
        job = replace(lora.job, out=folders[name], settings=chosen)
        export_policy(lora.engine.module.model, weights, job, FACTS)

    base, prompt = str(tiny_models / "policy"), full.job.examples[0].prompt.tolist()
    requests = [
        {"model": folders["full"], "adapter": None, "prompt": prompt},
        {"model": folders["merged"], "adapter": None, "prompt": prompt},
        {"model": base, "adapter": folders["adapter"], "prompt": prompt},
    ]
    script = Path(__file__).with_name("vllm_tokens.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(requests)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | VLLM,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads(done.stdout.splitlines()[-1])

    expected = []
    for folder in (folders["full"], folders["merged"], base):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        expected.append(out[0, len(prompt) :].tolist())
    assert written[0] == expected[0]
    assert written[1] == expected[1]
    assert written[2] == expected[1], "base with the adapter is the merged model"
    assert expected[2] not in (expected[0], expected[1]), "training changed nothing that can be seen"
