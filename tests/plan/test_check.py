"""A recipe that names what is not there is refused, with every problem at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.plan.check import absent_measures, check_nodes, hub_ids

NO_TENSORS = b"\x02" + bytes(7) + b"{}"  # a safetensors file


def problems(tiny: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        check_recipe(recipe(tiny, **changes))
    head, *lines = str(caught.value).splitlines()
    assert head == f"recipe tiny: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def test_tiny_checkpoints_are_fine(tiny: dict[str, Any]) -> None:
    check_recipe(recipe(tiny))


def test_rl_learns_from_all_candidates_so_all_are_rendered(tiny: dict[str, Any]) -> None:
    unset = {"dpo": "null", "pair": "{}", "rl": "{epochs: 1, lr: 1.0e-6, global_batch: 4}"}
    check_recipe(recipe(tiny, **unset))
    [found] = problems(tiny, **unset, render__strategy="adaptive")
    assert found.endswith("rl learns from all candidates: write strategy: all")


def test_every_problem_is_listed_at_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}", "utf-8")
    (tmp_path / "task.txt").write_text("no slot", "utf-8")
    (tmp_path / "critique.txt").write_text("{query} {query} {prompt}", "utf-8")
    found = problems(
        tiny,
        policy__model=tmp_path / "none",
        judge__model=tmp_path / "bare",
        render__model=empty,
        reward__model=empty,
        policy__task_prompt=tmp_path / "task.txt",
        judge__critique_prompt=tmp_path / "critique.txt",
        judge__refine_prompt=tmp_path / "none.txt",
        reward__checklist__file=tmp_path / "none.yaml",
        sft__data=tmp_path / "none.jsonl",
        sample__max_tokens=512,
        sample__engine__max_model_len=512,
        render__cache_options="{threshold: 0.1}",
    )
    expected = {
        "policy.model": "no such folder",
        "judge.model": "holds no weights",
        "render.model": "has no model_index.json",
        "render.cache_options has no effect without render.cache": "name a cache",
        "reward.model": "has no config.json",
        "reward.checklist.file": "no such file",
        "policy.task_prompt": "needs the slot {query} once",
        "judge.critique_prompt": "needs the slot {query} once",
        "judge.refine_prompt": "none.txt",
        "sft.data": "no such file",
        "sample.max_tokens 512 leaves no room in engine.max_model_len 512": "",
    }
    assert [line.split(":")[0] for line in found] == list(expected)
    assert all(says in line for line, says in zip(found, expected.values(), strict=True))


def test_a_model_of_another_kind_is_told(tiny: dict[str, Any], tiny_models: Path) -> None:
    [line] = problems(tiny, render__model=tiny_models / "policy")
    assert line.startswith("render.model:")
    assert "no checkpoint folder of this kind" in line


@pytest.mark.parametrize("name", ["org/model", "s3://bucket/model"])
def test_hub_ids_and_uris_are_taken_on_trust(tiny: dict[str, Any], name: str) -> None:
    check_recipe(recipe(tiny, policy__model=name, render__model=name))


def test_a_reward_behind_an_endpoint_is_no_folder(tiny: dict[str, Any]) -> None:
    check_recipe(recipe(tiny, reward__kind="openai", reward__model="gpt-4o"))


def test_a_checklist_that_cannot_be_used_is_told_before_a_video_is_made(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("One?\nTwo?\n", "utf-8")
    (tmp_path / "w.json").write_text("[1.0]", "utf-8")
    files = f"{{questions: {tmp_path}/q.txt, weights: {tmp_path}/w.json}}"
    changed = {key: value for key, value in tiny.items() if not key.startswith("reward.checklist")}
    [line] = problems(changed, reward__checklist=files)
    assert line.startswith("reward.checklist:")
    assert "has 1 weights" in line
    (tmp_path / "w.json").write_text("[1.0, 0]", "utf-8")
    check_recipe(recipe(changed, reward__checklist=files))
    assert problems(changed, reward__checklist=files, pair__dominance="dimension") == [
        "pair.dominance: dimension needs a checklist with dimensions, this one has none"
    ]


def test_a_hub_id_that_may_be_a_wrong_path_is_told(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_ids(recipe(tiny)) == []
    (tmp_path / "models/there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    named = recipe(tiny, policy__model="models/there", judge__model="models/typo", render__model="org/video")
    judge, render = hub_ids(named)
    assert judge.startswith("judge.model: models/typo is not a folder here; taken as a hub id")
    assert "there is a folder models" in judge
    assert render == "render.model: org/video is not a folder here; taken as a hub id"
    endpoint = recipe(tiny, reward__kind="openai", reward__model="org/judge")
    assert hub_ids(endpoint) == []


def test_the_judge_may_be_at_an_endpoint_or_an_adapter(tiny: dict[str, Any], tmp_path: Path) -> None:
    remote = recipe(tiny, judge__model="gpt-4o", judge__backend="openai")
    check_recipe(remote)
    assert hub_ids(recipe(tiny, judge__model="org/gpt", judge__backend="openai")) == []
    settings = {"base_model_name_or_path": "org/base", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(NO_TENSORS)
    check_recipe(recipe(tiny, judge__model=tmp_path))


def test_what_drafts_need_is_checked(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"query": "a", "prompt": "b"}\n' * 2, "utf-8")
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n', "utf-8")
    (tmp_path / "draft.txt").write_text("{query}", "utf-8")
    check_recipe(recipe(tiny, draft__examples=tmp_path / "two.jsonl", draft__shots=2))
    assert problems(tiny, draft__examples=tmp_path / "two.jsonl") == [
        f"draft.shots 3: {tmp_path}/two.jsonl has 2 examples only"
    ]
    [prompt, llm, examples] = sorted(
        problems(
            tiny,
            draft__examples=tmp_path / "none.jsonl",
            draft__prompt=tmp_path / "draft.txt",
            draft__llm__model=tmp_path / "none",
        ),
        key=lambda line: line[6:],
        reverse=True,
    )
    assert "needs the slot {examples} once" in prompt
    assert llm.startswith("draft.llm.model: no such folder")
    assert examples.startswith("draft.examples: no such file")
    [line] = problems(tiny, draft__examples=tmp_path / "bad.jsonl")
    assert "row 1 needs" in line


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("{path: FOLDER/none.safetensors}", "render.lora.path: no such file or folder"),
        ("{path: FOLDER/weights.bin}", "is no *.safetensors file"),
        ("{path: FOLDER}", "has a.safetensors, b.safetensors; name one"),
        ("{path: FOLDER/empty}", "has none; name one"),
        ("{path: FOLDER/broken}", "FOLDER/broken/a.safetensors is no safetensors file"),
        (
            "{path: FOLDER, weight_name: c.safetensors}",
            "weight_name: FOLDER has no c.safetensors",
        ),
        ("{path: FOLDER, weight_name: a.safetensors}", None),
        ("{path: FOLDER/a.safetensors}", None),
        ("{path: org/lora}", None),
    ],
)
def test_the_video_models_lora_is_looked_for(
    tiny: dict[str, Any], tmp_path: Path, lora: str, says: str | None
) -> None:
    for name in ("a.safetensors", "b.safetensors", "weights.bin", "empty/readme", "broken/a.safetensors"):
        (tmp_path / "lora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lora" / name).write_bytes(NO_TENSORS)
    (tmp_path / "lora/broken/a.safetensors").write_text("a page that says 404", "utf-8")
    asked = lora.replace("FOLDER", str(tmp_path / "lora"))
    if says is None:
        check_recipe(recipe(tiny, render__lora=asked))
        on_hub = [line for line in hub_ids(recipe(tiny, render__lora=asked)) if "lora" in line]
        assert bool(on_hub) == ("org/lora" in lora)
        return
    [line] = problems(tiny, render__lora=asked)
    assert says.replace("FOLDER", str(tmp_path / "lora")) in line


@pytest.mark.ray
def test_a_node_without_the_model_of_another_is_named(
    ray_cluster: None, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_nodes(recipe(tiny))
    text = "import pydantic\nclass Model:\n    class Options(pydantic.BaseModel):\n        pass\n"
    text += "    def __init__(self, settings, options): ...\n    def score(self, videos, queries): ...\n"
    (tmp_path / "only_at_the_driver.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    there = recipe(tiny, more_rewards="{mine: {kind: 'only_at_the_driver:Model'}}")
    check_recipe(there)
    with pytest.raises(PlanError, match=r"more_rewards.mine.kind on node .*cannot be imported"):
        check_nodes(there)


def test_models_of_measures_are_looked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    measure = {
        "kind": "vbench",
        "dimensions": ["subject_consistency", "aesthetic_quality"],
        "dino": str(tmp_path / "dino"),
        "aesthetic": {"clip": "openai/clip-vit-large-patch14", "head": str(tmp_path / "head")},
    }
    told = [f"dino: no such folder: {tmp_path}/dino", f"aesthetic.head: no such file: {tmp_path}/head"]
    assert problems(tiny, more_rewards__look=measure) == [f"more_rewards.look.{line}" for line in told]
    evaluated = recipe(tiny, evaluate__rewards__look=measure)
    check_recipe(evaluated)  # an evaluation can do without
    left_out = "; vpo evaluate leaves this measure out"
    assert absent_measures(evaluated) == [f"evaluate.rewards.look.{line}{left_out}" for line in told]


def test_files_of_prompt_a_videos_rewards_are_looked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    gone = f"{tmp_path}/gone"
    found = problems(
        tiny,
        pair__dominance="none",
        reward={"kind": "laion_aesthetic", "options": {"clip": gone, "head": f"{gone}.safetensors"}},
        more_rewards__mps={"kind": "mps", "model": gone},
        more_rewards__vs={"kind": "videoscore", "model": "some/hub", "options": {"query_prompt": gone}},
    )
    assert [line for line in found if "reward" in line] == [
        f"reward.options.clip: no such folder: {gone}",
        f"reward.options.head: no such file: {gone}.safetensors",
        f"more_rewards.mps.model: no such folder: {gone}",
        f"more_rewards.vs.options.query_prompt: no such file: {gone}",
    ]


def test_what_an_evaluation_asks_and_reads_is_looked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n", "utf-8")
    (tmp_path / "two.jsonl").write_text('{"query": "a", "prompt": "b"}\n' * 2, "utf-8")
    (tmp_path / "critique.txt").write_text("{query}", "utf-8")
    gone = {"model": str(tmp_path / "gone")}
    shown = {"kind": "few_shot", "examples": str(tmp_path / "two.jsonl"), "llm": gone}
    found = problems(
        tiny,
        evaluate__judge={**gone, "critique_prompt": str(tmp_path / "critique.txt")},
        evaluate__guard=gone,
        evaluate__prefer_prompts={"llm": gone},
        evaluate__policies={"query": {"kind": "query"}, "shown": shown},
        evaluate__required_words=tmp_path / "none.txt",
        evaluate__unsafe_words=tmp_path / "empty.txt",
    )
    told = {line.partition(": ")[0]: line for line in found}
    assert all("no such folder" in line for key, line in told.items() if key.endswith(".model"))
    assert sorted(told) == [
        "evaluate.guard.model",
        "evaluate.judge.critique_prompt",
        "evaluate.judge.model",
        "evaluate.policies.shown.llm.model",
        "evaluate.policies.shown.shots 3",
        "evaluate.prefer_prompts.llm.model",
        "evaluate.required_words",
        "evaluate.unsafe_words",
    ]


def test_further_pairs_are_looked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A run would go on without them."""
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        told = f"pair.also: {tmp_path / name} holds no pairs"
        assert problems(tiny, pair__also=tmp_path / name) == [told]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, None),
        ({"profile": "short"}, None),
        ({"profile": "long"}, "row 1 names the profile 'long'"),
        ({"profile": "short", "prompt": "one two three"}, "does not meet its profile short"),
    ],
)
def test_profiles_of_sft_data_are_looked_at(
    tiny: dict[str, Any], tmp_path: Path, row: dict[str, str], says: str | None
) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"query": "a", "prompt": "b", **row}) + "\n", "utf-8")
    changes: dict[str, Any] = {
        "sft__data": tmp_path / "s.jsonl",
        "sft__profile_column": "profile",
        "profiles__short": "{share: 0.5, max_words: 2}",
    }
    if says is None:
        check_recipe(recipe(tiny, **changes))
        (tmp_path / "s.csv").write_text("query,prompt\na,b\n", "utf-8")
        changes["sft__data"], says = tmp_path / "s.csv", "no column 'profile'"
    [line] = problems(tiny, **changes)
    assert says in line
