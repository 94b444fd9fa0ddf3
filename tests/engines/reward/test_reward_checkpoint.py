import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vpo_ray.engines.reward import model
from vpo_ray.engines.reward.checkpoint import CheckpointError, read_config, tensor_shapes


@pytest.fixture
def folder(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "reward", tmp_path / "reward"))


def load(folder: Path) -> model.CogVLM2Video:
    return model.load_reward_model(folder, torch.float32, "cpu")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def test_every_tensor_of_the_published_layout_is_expected(golden: Path) -> None:
    index = json.loads((golden / "model.safetensors.index.json").read_text("utf-8"))
    assert set(tensor_shapes(read_config(golden))) == set(index["weight_map"])


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.vision_mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.vision.boi"] = torch.zeros(1, 1, 3)

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  1 missing: model.norm.weight"
    assert lines[2] == "  1 unexpected: model.layers.0.mlp.vision_mlp.up_proj.weight"
    assert lines[3] == "  1 misshapen: model.vision.boi is [1, 1, 3], config.json makes it [1, 1, 64]"


@pytest.mark.parametrize("prefix", ["module.", "model.", "base_model.model."])
def test_a_prefix_of_every_name_is_said(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"every name begins with '{prefix}'"):
        load(folder)


def test_quantised_tensors_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"1 quantised: lm_head\.weight is I8"):
        load(folder)


def test_a_file_that_is_not_whole_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"{weights} has \d+ of \d+ bytes: download it again"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\]"),
        ({"hidden_size": None}, "no number for hidden_size"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"num_attention_heads": 5}, "hidden_size is not a multiple of num_attention_heads"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_absent_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        load(folder)


def test_rotary_frequencies_that_differ_by_layer_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t["model.layers.1.self_attn.rotary_emb.inv_freq"].mul_(2))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq"):
        load(folder)


def test_a_policy_is_no_reward_model(tiny_models: Path) -> None:
    with pytest.raises(CheckpointError, match="CogVLMVideoForCausalLM"):
        load(tiny_models / "policy")
