"""Exports are read alike by transformers 4, which older vLLM and other trainers use, and by 5."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_data import FACTS, TASK_PROMPT, settings

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.train.examples import end_of_turn
from vpo_ray.train.lora import attach
from vpo_ray.train.save_pretrained import export_policy

pytestmark = pytest.mark.engine

OLDER = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def config_of(kind: str, tokenizer: Any) -> Any:
    import transformers

    name, rope, more = {
        "llama": ("Llama", {"rope_type": "default", "rope_theta": 500000.0}, {}),
        "llama3": ("Llama", LLAMA3, {"tie_word_embeddings": True}),
        "yarn": ("Llama", YARN, {}),
        "partial": (
            "StableLm",
            {"rope_type": "default", "rope_theta": 7000.0, "partial_rotary_factor": 0.5},
            {},
        ),
        "gemma3": ("Gemma3Text", GEMMA3, {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2}),
    }[kind]
    return getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        rope_parameters=deepcopy(rope),
        **more,
    )


def exported(tiny_models: Path, folder: Path, kind: str, lora: Any = None) -> Path:
    """A random model of the kind, exported as training does."""
    from peft import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT)
    base, out = folder / f"base-{kind}", folder / f"{kind}-{'adapter' if lora else 'whole'}"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(kind, tokenizer))
    if lora:
        model.save_pretrained(base)
        from vpo_ray.train.portable import for_older_readers

        for_older_readers(base)
    chosen = settings(lora=lora)
    job: Any = SimpleNamespace(
        settings=chosen, model=str(base), revision=None, trust_remote_code=False, tokenizer=tokenizer,
        end=end_of_turn(tokenizer, TASK_PROMPT), out=str(out),
    )  # fmt: skip
    if chosen.lora:
        model = attach(model, chosen.lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    export_policy(model, get_peft_model_state_dict(model) if lora else model.state_dict(), job, FACTS)
    return out


def test_a_config_says_it_in_both_ways(tiny_models: Path, tmp_path: Path):
    from transformers import AutoConfig

    def read(kind: str) -> dict[str, Any]:
        out = exported(tiny_models, tmp_path, kind)
        tree = json.loads((out / "config.json").read_text("utf-8"))
        written = config_of(kind, load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT))
        assert AutoConfig.from_pretrained(out).rope_parameters == written.rope_parameters
        assert tree["torch_dtype"] == tree["dtype"] == "float32"
        return tree

    plain = read("llama")
    assert plain["rope_theta"] == 500000.0
    assert "rope_scaling" not in plain
    assert plain["tie_word_embeddings"] is False
    scaled = read("llama3")
    assert scaled["rope_theta"] == 500000.0
    assert scaled["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert scaled["tie_word_embeddings"] is True
    assert read("yarn")["rope_scaling"]["factor"] == 4.0
    assert read("partial")["partial_rotary_factor"] == 0.5
    layered = read("gemma3")
    assert (layered["rope_theta"], layered["rope_local_base_freq"]) == (1000000.0, 10000.0)


def test_phi_3_has_the_three_keys_that_transformers_4_takes(tmp_path: Path):
    from transformers import AutoConfig, Phi3Config

    from vpo_ray.train.portable import for_older_readers

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "original_max_position_embeddings": 64}
    Phi3Config(**sizes, max_position_embeddings=256, rope_parameters=rope).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    for_older_readers(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert tree["rope_scaling"] == {"type": "longrope", **factors}
    assert tree["original_max_position_embeddings"] == 64
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == {
        **before.rope_parameters,
        "type": "longrope",
    }


def test_a_tokenizer_has_a_name_and_tokens_that_older_readers_know(tiny_models: Path, tmp_path: Path):
    out = exported(tiny_models, tmp_path, "llama")
    tree = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert tree["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tree.get("extra_special_tokens"), list)
    assert tree["chat_template"] == (out / "chat_template.jinja").read_text("utf-8")
    assert not {"is_local", "local_files_only"} & tree.keys()
    before, after = load_tokenizer(str(tiny_models / "policy"), TASK_PROMPT), load_tokenizer(str(out))
    assert set(after.all_special_tokens) == set(before.all_special_tokens)


def test_an_adapter_names_only_what_it_needs(tiny_models: Path, tmp_path: Path):
    out = exported(tiny_models, tmp_path, "llama", {"r": 2, "merge": False, "rslora": True})
    tree = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (tree["r"], tree["use_rslora"], tree["peft_type"]) == (2, True, "LORA")
    assert not {"arrow_config", "corda_config", "alora_invocation_tokens", "peft_version"} & tree.keys()


@pytest.mark.slow
def test_transformers_4_reads_what_transformers_5_reads(tiny_models: Path, tmp_path: Path):
    older = tmp_path / "older"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(older), *OLDER]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr[-200:]}")
    kinds = ("llama", "llama3", "yarn", "partial", "gemma3")
    folders = [str(exported(tiny_models, tmp_path, kind)) for kind in kinds]
    folders.append(str(exported(tiny_models, tmp_path, "llama", {"r": 2})))
    folders.append(str(exported(tiny_models, tmp_path, "llama3", {"r": 2, "merge": False})))

    def read(*path: Path) -> Any:
        script = Path(__file__).with_name("older_reader.py")
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
        told = subprocess.run(
            [sys.executable, str(script), *folders], capture_output=True, text=True, timeout=300, env=env
        )
        assert told.returncode == 0, told.stderr[-3000:]
        return json.loads(told.stdout)

    now, before = read(), read(older)
    assert (now["version"].split(".")[0], before["version"].split(".")[0]) == ("5", "4")
    for folder in folders:
        ours, theirs = now["found"][folder], before["found"][folder]
        assert theirs.pop("logits") == pytest.approx(ours.pop("logits"), rel=1e-3, abs=1e-4), folder
        assert theirs == ours, folder
