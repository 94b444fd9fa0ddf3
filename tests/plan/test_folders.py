"""A plan looks into the folders of models as people have them, before a GPU is touched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from vpo_ray.plan.check import _of_files, absent_measures
from vpo_ray.plan.models import asks

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2298536\n"


def told(tiny: dict[str, Any], **changes: Any) -> list[str]:
    return list(_of_files(recipe(tiny, **changes)))


@pytest.mark.parametrize(
    ("key", "name", "file"),
    [
        ("policy.model", "policy", "model.safetensors"),
        ("judge.model", "judge", "tokenizer.json"),
        ("reward.model", "reward", "model.safetensors"),
        ("render.model", "video", "transformer/diffusion_pytorch_model.safetensors"),
        ("render.model", "video", "tokenizer/tokenizer.json"),
    ],
)
def test_pointers_of_git_lfs_are_told(
    key: str, name: str, file: str, tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models / name, tmp_path / "clone")
    (folder / file).write_text(POINTER, "utf-8")
    [line] = told(tiny, **{key.replace(".", "__"): folder})
    place = (folder / file).parent
    assert line.startswith(f"{key}: {place} has git-LFS pointers in the place of {Path(file).name}: ")


def test_a_folder_by_its_uri_is_looked_at(tiny: dict[str, Any], tiny_models: Path, tmp_path: Path) -> None:
    keys = {
        "policy": "policy.model",
        "judge": "judge.model",
        "video": "render.model",
        "reward": "reward.model",
    }
    asked = {}
    for name, key in keys.items():
        folder = shutil.copytree(tiny_models / name, tmp_path / f"a #{name}")
        asked[key.replace(".", "__")] = folder.as_uri()
    assert told(tiny, **asked) == []
    assert {ask.key for ask in asks(recipe(tiny, **asked))} == {"policy.model", "judge.model"}
    for path in tmp_path.glob("a #*/**/*.safetensors"):
        path.write_text(POINTER, "utf-8")
    assert {line.partition(":")[0] for line in told(tiny, **asked)} == set(keys.values())
    [line] = told(tiny, policy__model=(tmp_path / "none").as_uri())
    assert "no such folder" in line


def cut(folder: Path) -> None:
    os.truncate(folder / "vae/diffusion_pytorch_model.safetensors", 100_000)


def shard(folder: Path) -> None:
    tree = {"weight_map": {"w": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    path = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(tree), "utf-8")


PIPELINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no component": (lambda f: shutil.rmtree(f / "vae"), "FOLDER lacks the component vae of its model_index"),
    "empty component": (lambda f: (f / "vae/config.json").unlink(), "FOLDER/vae has no config.json"),
    "no weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "FOLDER/vae holds no weights (*.safetensors)",
    ),
    "cut": (cut, "FOLDER/vae/diffusion_pytorch_model.safetensors has 100000 of"),
    "shard": (shard, "FOLDER/transformer lacks diffusion_pytorch_model-00001-of-00002.safetensors"),
    "no index": (lambda f: (f / "model_index.json").write_text("[]"), "FOLDER/model_index.json is no index"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_pipeline_lacks_is_told(
    name: str, tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    change, says = PIPELINES[name]
    folder = shutil.copytree(tiny_models / "video", tmp_path / "video")
    change(folder)
    [line] = told(tiny, render__model=folder)
    assert line.startswith(f"render.model: {says.replace('FOLDER', str(folder))}")


def test_a_folder_with_checkpoints_in_it_names_them(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/0a1b"
    shutil.copytree(tiny_models / "policy", snapshot)
    [line] = told(tiny, policy__model=tmp_path / "models--org--name")
    assert line.endswith(f"it has no config.json; did you mean {snapshot}?")


def test_a_policy_is_one_that_training_loads(tiny: dict[str, Any], tiny_models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models / "policy", tmp_path / "policy")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    [line] = told(tiny, policy__model=folder)
    assert line.startswith(f"policy.model: {folder} has neither model.safetensors nor")
    assert told(tiny, judge__model=folder) == []
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    [line] = told(tiny, policy__model=folder)
    assert "is a LoRA adapter and not a whole model" in line


def rename(folder: Path, name: str, kind: str = "F32") -> None:
    header = json.dumps({name: {"dtype": kind, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32", "is quantised, by its weights (model.layers.0"),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", "is quantised, by its weights"),
        ("module.model.norm.weight", "F32", "names all begin with 'module.'"),
        ("base_model.model.model.norm.weight", "F32", "names all begin with 'base_model.model.'"),
        ("model.norm.weight", "F32", None),
    ],
)
def test_names_of_weights_say_whether_they_can_be_trained(
    name: str, kind: str, says: str | None, tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models / "policy", tmp_path / "policy")
    rename(folder, name, kind)
    found = told(tiny, policy__model=folder)
    assert len(found) == (says is not None)
    assert says is None or says in found[0]
    assert told(tiny, judge__model=folder) == []


def test_folders_of_an_evaluation_are_looked_at(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    policy = shutil.copytree(tiny_models / "policy", tmp_path / "policy")
    video = shutil.copytree(tiny_models / "video", tmp_path / "video")
    settings = {
        "policies": {"other": {"kind": "checkpoint", "path": str(policy)}, "query": {"kind": "query"}},
        "transfer": {"further": {"model": str(video), "frames": 9, "height": 32, "width": 48}},
    }
    asked = {"evaluate": json.dumps(settings)}
    assert told(tiny, **asked) == []
    (policy / "model.safetensors").write_text(POINTER, "utf-8")
    shutil.rmtree(video / "vae")
    of_video, of_policy = told(tiny, **asked)
    assert of_video.startswith(f"evaluate.transfer.further.model: {video} lacks the component vae")
    assert of_policy.startswith(f"evaluate.policies.other.path: {policy} has git-LFS pointers")
    shutil.rmtree(policy)
    assert told(tiny, **asked) == [of_video], "it may be trained before"


def test_a_measure_that_is_here_and_broken_is_a_problem(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models / "reward", tmp_path / "reward")
    checklist = {"file": str(folder / "checklist.yaml")}
    asked = {"evaluate": json.dumps({"rewards": {"own": {"model": str(folder), "checklist": checklist}}})}
    assert told(tiny, **asked) == absent_measures(recipe(tiny, **asked)) == []
    (folder / "model.safetensors").write_text(POINTER, "utf-8")
    [line] = told(tiny, **asked)
    assert line.startswith(f"evaluate.rewards.own.model: {folder} has git-LFS pointers")
    assert absent_measures(recipe(tiny, **asked)) == []
    shutil.rmtree(folder)
    assert told(tiny, **asked) == []
    [left_out] = absent_measures(recipe(tiny, **asked))
    assert left_out.endswith("no such folder: " + str(folder) + "; vpo evaluate leaves this measure out")


def test_the_weights_of_a_reward_are_those_of_its_configuration(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models / "reward", tmp_path / "reward")
    (folder / "tokenizer.json").unlink()
    [line] = told(tiny, reward__model=folder)
    assert line.startswith(f"reward.model: {folder} has no tokenizer.json")
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(tree | {"vocab_size": 1000}), "utf-8")
    [line] = told(tiny, reward__model=folder)
    assert "2 misshapen: lm_head.weight is [1088, 64], config.json makes it [1000, 64]" in line


def adapter(folder: Path, base: Any, **settings: Any) -> Path:
    folder.mkdir()
    tree = {"base_model_name_or_path": base, "r": 8, "peft_type": "LORA", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(tree), "utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "no adapter with use_dora true"),
        ({"modules_to_save": ["lm_head"]}, "no adapter with modules_to_save"),
        ({"rank_pattern": {"q_proj": 64}}, "no adapter with rank_pattern"),
        ({"bias": "all"}, 'no adapter with bias "all"'),
        ({"r": 700}, "no adapter with the rank 700, at most 512"),
        ({"peft_type": "PREFIX_TUNING"}, "not the settings of a LoRA adapter: peft_type is PREFIX_TUNING"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None: write"),
        ({"base_model_name_or_path": "/no/base"}, "no such folder: /no/base, which"),
    ],
)
def test_a_judges_adapter_is_one_that_vllm_takes(
    settings: dict[str, Any], says: str, tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    good = adapter(tmp_path / "good", str(tiny_models / "judge"), modules_to_save=None, rank_pattern={})
    assert told(tiny, judge__model=good) == []
    [line] = told(tiny, judge__model=adapter(tmp_path / "bad", str(tiny_models / "judge"), **settings))
    assert line.startswith("judge.model: ")
    assert says in line


def test_the_weights_of_an_adapter_and_of_its_base_are_looked_at(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models / "judge", tmp_path / "base")
    (base / "model.safetensors").write_text(POINTER, "utf-8")
    folder = adapter(tmp_path / "adapter", str(base))
    (folder / "adapter_model.safetensors").write_text(POINTER, "utf-8")
    own, of_base = told(tiny, judge__model=folder)
    assert str(folder) in own
    assert of_base.startswith(f"judge.model: {base} has git-LFS pointers")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert told(tiny, judge__model=folder) == [of_base]
