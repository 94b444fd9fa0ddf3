"""`vpo plan` finds what a recipe names and is not there, and says what the run will take."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.plan import PlanError, check, plan
from vpo_ray.recipe import Recipe, load
from vpo_ray.storage import RunDir

ROOT = Path(__file__).parents[1]
TINY = ROOT / "jobs/recipes/tiny.yaml"


@pytest.fixture
def tiny(tiny_models: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides that make tiny.yaml usable from any folder."""
    queries = tmp_path / "queries.txt"
    queries.write_text("\n".join(f"query number {number}" for number in range(100)) + "\n\nquery number 1\n")
    return {
        "out": tmp_path / "run",
        "queries.path": queries,
        "queries.splits": "{dpo: 1}",
        "policy.model": tiny_models / "policy",
        "judge.model": tiny_models / "judge",
        "render.model": tiny_models / "video",
        "reward.model": tiny_models / "reward",
        "reward.checklist.file": tiny_models / "reward/checklist.yaml",
        "sft.data": ROOT / "vpo_ray/data/sft.jsonl",
    }


def recipe(tiny: dict[str, Any], **changes: Any) -> Recipe:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load(TINY, [f"{key}={value}" for key, value in {**tiny, **named}.items()])


def problems(tiny: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        check(recipe(tiny, **changes))
    head, *lines = str(caught.value).splitlines()
    assert head == f"recipe tiny: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def test_tiny_checkpoints_are_fine(tiny: dict[str, Any]) -> None:
    check(recipe(tiny))


def test_every_problem_is_listed_at_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    (tmp_path / "task.txt").write_text("no slot")
    (tmp_path / "critique.txt").write_text("{query} {query} {prompt}")
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
    )
    expected = {
        "policy.model": "no such folder",
        "judge.model": "holds no weights",
        "render.model": "has no model_index.json",
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
    check(recipe(tiny, policy__model=name, render__model=name))


def test_a_reward_behind_an_endpoint_is_no_folder(tiny: dict[str, Any]) -> None:
    check(recipe(tiny, reward__kind="openai", reward__model="gpt-4o"))


def test_a_checklist_that_cannot_be_used_is_told_before_a_video_is_made(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("One?\nTwo?\n")
    (tmp_path / "w.json").write_text("[1.0]")
    files = f"{{questions: {tmp_path}/q.txt, weights: {tmp_path}/w.json}}"
    changed = {key: value for key, value in tiny.items() if not key.startswith("reward.checklist")}
    [line] = problems(changed, reward__checklist=files)
    assert line.startswith("reward.checklist:")
    assert "has 1 weights" in line
    (tmp_path / "w.json").write_text("[1.0, 0]")
    check(recipe(changed, reward__checklist=files))
    assert problems(changed, reward__checklist=files, pair__dominance="dimension") == [
        "pair.dominance: dimension needs a checklist with dimensions, this one has none"
    ]


def test_what_it_will_take(tiny: dict[str, Any]) -> None:
    planned = recipe(tiny, sample__k=3, render__steps=7, render__frames=9, dpo__lr="1.0e-4")
    text = plan(planned)
    assert "102 rows read, 2 dropped, 100 for feedback, 3 candidates each" in text
    stages = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    for stage in ("sample", "judge", "render", "score"):
        assert " 300 " in stages[stage]
        assert "not measured yet" in stages[stage]
    assert f"up to 300 of 9 x {planned.render.width} x {planned.render.height}, 7 steps" in stages["videos"]
    assert "ZeRO-3" in stages["sft"]
    assert "lr 0.0001" in stages["dpo"]
    assert planned.fingerprint() in stages["recipe"]


@pytest.mark.parametrize(("limit", "expected"), [(10, "10 for feedback"), (1000, "100 for feedback")])
def test_a_limit_counts(tiny: dict[str, Any], limit: int, expected: str) -> None:
    assert expected in plan(recipe(tiny, queries__limit=limit))


def test_only_the_dpo_split_is_rendered(tiny: dict[str, Any]) -> None:
    assert "up to 0 of" in plan(recipe(tiny, queries__splits="{dpo: 0, eval: 1}"))


def test_a_measured_run_predicts_the_next(tiny: dict[str, Any], tmp_path: Path) -> None:
    stages = {"render": {"seconds_per_row": 90.0}, "score": {"seconds_per_row": 0.0}, "sample": {}}
    RunDir(tmp_path / "run").write_json("ledger.json", {"stages": stages})
    text = plan(recipe(tiny, sample__k=4, render__pool__size="[1, 4]"))
    [render] = [line for line in text.splitlines() if line.startswith("render")]
    # 100 queries x 4 candidates x 90 s = 10 replica-hours, 2.5 hours on four replicas.
    assert render.split() == ["render", "400", "1-4", "90.000", "10.00", "2.50"]
    assert text.count("not measured yet") == 3


def test_rows_that_are_no_text_do_not_stop_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(["fine", "half \ud800", None, 3, {"other": 1}]))
    assert "5 rows read, 4 dropped, 1 for feedback" in plan(recipe(tiny, queries__path=path))
