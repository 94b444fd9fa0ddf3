"""A policy that sees, trained on the cluster, exported, and asked by vLLM with the image."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing_data import put, shown_pairs
from test_vllm_export import VLLM
from train_data import TASK_PROMPT, run, settings

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.image_files import decode_image
from vpo_ray.prompts.image_places import image_lines
from vpo_ray.prompts.policy_prompt import prompt_ids
from vpo_ray.storage.images import ImageStore
from vpo_ray.world import tiny

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_two_workers_train_it_and_vllm_reads_the_prompt_that_was_trained(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Under ZeRO-3, where a pack has images and another none."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny.make_vlm(tmp_path / "vlm")
    store = ImageStore(tmp_path / "images")
    rows = [{**row, "prompt": row["chosen"]} for row in shown_pairs(store)]
    chosen = settings(zero_stage=3, workers=2, global_batch=4, micro_batch=1, epochs=4, lr=3e-3)
    result = run(tmp_path, tmp_path / "vlm", chosen, "sft", rows, store.folder.uri)
    assert (result.rows, result.steps) == (4, 4)
    curve = [
        json.loads(line)["loss"] for line in (tmp_path / "metrics/sft.jsonl").read_text("utf-8").splitlines()
    ]
    assert curve[-1] < 0.8 * curve[0]

    policy = str(tmp_path / "policy")
    tokenizer, name = load_tokenizer(policy), put(store, "red")
    picture = decode_image(store.read(name))
    bare = prompt_ids(tokenizer, rows[0]["query"], image_lines("<image>"))
    asked = {"model": policy, "adapter": None, "prompt": bare, "image": f"{store.folder.path}/{name}"}
    script = Path(__file__).with_name("vllm_tokens.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([asked])],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | VLLM,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [written] = json.loads(done.stdout.splitlines()[-1])

    processor = AutoProcessor.from_pretrained(policy)
    given = {"return_tensors": "pt", "add_special_tokens": False}
    inputs: Any = processor(text=tokenizer.decode(bare), images=[picture], **given)
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert written == out[0].tolist()
    assert TASK_PROMPT.split("{query}")[0].strip()[:20] in tokenizer.decode(written)
