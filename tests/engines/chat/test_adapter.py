"""A policy that is a LoRA adapter names the folder of its base model, which may move together with it."""

import json
import shutil
from pathlib import Path

from vpo_ray.engines.chat.adapter import adapter_of


def run_with_adapter(folder: Path, base: str) -> Path:
    for name, file, content in (
        ("sft", "config.json", {}),
        ("dpo", "adapter_config.json", {"base_model_name_or_path": base, "r": 16}),
    ):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / file).write_text(json.dumps(content), "utf-8")
    return folder


def base_of(run: Path) -> str:
    found = adapter_of(str(run / "checkpoints/dpo"))
    assert found is not None
    return found.base


def test_the_base_is_where_the_adapter_says_or_moved_with_it(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "run", str(tmp_path / "run/checkpoints/sft"))
    copied = shutil.copytree(run, tmp_path / "copied")
    assert base_of(copied) == str(run / "checkpoints/sft")
    moved = run.rename(tmp_path / "moved")
    assert base_of(moved) == str(moved / "checkpoints/sft")
    shutil.rmtree(moved / "checkpoints/sft")
    assert base_of(moved) == str(run / "checkpoints/sft"), "what is missing is named as the adapter does"


def test_a_base_of_the_hub_is_none_beside_the_adapter(tmp_path: Path) -> None:
    assert base_of(run_with_adapter(tmp_path / "run", "maker/sft")) == "maker/sft"
