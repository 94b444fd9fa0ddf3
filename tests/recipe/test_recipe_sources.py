"""Paths in a recipe: `~` is the reader's home in every one; what a run reads can be listed."""

import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_ray import cli
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Recipe, Section, load, locate, parse, sources
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
# Fields of text that name nothing on a disk.
NO_PLACES = {
    "name", "column", "revision", "accelerator_type", "azure_api_version", "api_key_env", "base_url",
    "weight_name", "preset", "scheduler", "negative_prompt", "attention", "device", "project", "run_name",
    "license", "host", "model_name", "reward", "version",
}  # fmt: skip


def text_fields(section: type[Section]) -> list[tuple[type[Section], str]]:
    found = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        kinds += [inner for kind in kinds for inner in typing.get_args(kind)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        for one in inner:
            found += text_fields(one)
        if (
            not inner
            and str in kinds
            and name not in NO_PLACES
            and typing.get_origin(field.annotation) is not dict
        ):
            found.append((section, name))
    return found


def test_a_home_in_any_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tree: dict[str, Any] = yaml.safe_load(TINY.read_text("utf-8"))
    phase = {"epochs": 1, "lr": 1e-5, "global_batch": 8}
    service = {"model": "m"}
    tree["out"], tree["queries"]["path"] = "~/out", ["~/q.txt", "~/more/*"]
    tree["queries"] |= {"rules": {"keywords": "~/k"}, "unsafe_judge": True, "unsafe_prompt": "~/u"}
    tree["policy"] = {"model": "~/policy", "task_prompt": "~/p"}
    tree["draft"] = {"examples": "~/e", "prompt": "~/d", "llm": {"model": "~/llm"}}
    tree["sft"] = {"data": "~/sft", "offload": {"optimizer": "nvme", "nvme_path": "~/nvme"}, **phase}
    tree["sample"]["engine"] = {"env": {"CACHE": "~/cache", "FLAG": "1"}}
    tree["judge"] |= {"model": "~/judge", "critique_prompt": "~/c", "refine_prompt": "~/r"}
    tree["render"] |= {"model": "~/video", "store": "~/store", "lora": {"path": "~/lora"}}
    tree["reward"] |= {"model": "~/reward", "checklist": {"file": "~/list"}}
    checklist = {"questions": "~/questions", "weights": "~/weights"}
    tree["more_rewards"] = {"other": {"model": "~/other", "checklist": checklist}}
    tree["serve"] = {
        "keys": "~/keys",
        "canary": {"checkpoint": "~/canary", "share": 0.1},
        "videos": {"store": "~/videos"},
        "safety": {"query": "refuse", "keywords": "~/words", "judge": service, "judge_prompt": "~/s"},
        "best_of": {"judge": service, "judge_prompt": "~/b"},
    }
    recipe = parse(tree, "recipe")
    assert "~" not in json.dumps(recipe.dump())
    assert recipe.out == f"{tmp_path}/out"
    assert recipe.sample.engine.env == {"CACHE": f"{tmp_path}/cache", "FLAG": "1"}
    named = dict(sources(recipe))
    assert named["sft.data"] == f"{tmp_path}/sft"
    assert named["more_rewards.other.checklist.weights"] == f"{tmp_path}/weights"
    assert [path for key, path in sources(recipe) if key == "queries.path"] == recipe.queries.path
    written = {"out", "render.store", "serve.videos.store", "sft.offload.nvme_path", "endpoint.answers"}
    assert not {key for key in named for end in written if key.endswith(end)}


def test_every_field_of_text_is_a_place_or_known_to_be_none(tmp_path: Path) -> None:
    """A new key that holds a path is to be declared as one."""
    unknown = set()
    for section, name in text_fields(Recipe):
        field = section.model_fields[name]
        if "AfterValidator" not in repr((field.annotation, field.metadata)):
            unknown.add(f"{section.__name__}.{name}")
    lists = {"Rules.languages", "Queries.unsafe_columns", "TrainLora.target_modules", "Serve.cors_origins"}
    names = {"Service.model", "Reward.yes_tokens", "Reward.no_tokens", "Queries.image_column"}
    names |= {"Sft.profile_column", "Sft.image_column", "EvaluatedSet.image_column", "Evaluation.profile"}
    names |= {"EvaluatedSet.category", "Preference.against", "Feedback.notice", "Feedback.secret_env"}
    assert unknown <= lists | names, unknown


def test_a_home_wherever_a_path_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("Ask {query}", "utf-8")
    (tmp_path / "s.jsonl").write_text('{"query": "a", "prompt": "b"}\n', "utf-8")
    (tmp_path / "recipe.yaml").write_bytes(TINY.read_bytes())
    assert read_prompt("~/p.txt") == "Ask {query}"
    assert len(list(sft_rows("~/s.jsonl"))) == 1
    assert RunDir("~/run").uri == str(tmp_path / "run")
    assert locate("~/p.txt") == str(tmp_path / "p.txt")
    assert load("~/recipe.yaml", ["out=~/x"]).out == str(tmp_path / "x")
    monkeypatch.chdir(TINY.parents[2])
    assert cli.main(["curate", "~/recipe.yaml", "--out", "~/run"]) == 0
    assert (tmp_path / "run/ledger.json").is_file()
    assert cli.main(["videos", "ls", "~/none"]) == 2
