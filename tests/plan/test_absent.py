"""A plan where files are not on this machine: the rest is planned, they are listed, and the status tells."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from vpo_ray import cli
from vpo_ray.plan import PlanError, plan
from vpo_ray.plan.absent import absent_sources, only_absent
from vpo_ray.plan.cluster import described
from vpo_ray.recipe import load


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    status = cli.main(["plan", *arguments, "--json"])
    told = capsys.readouterr()
    return status, json.loads(told.out or "{}"), told.err


def test_the_papers_recipe_is_planned_on_a_machine_that_has_none_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = ["--gpus", "8", "--gpu-type", "H100"]
    status, found, _ = planned(capsys, "vpo_cogvideox_5b", *cluster, "--queries", "10000")
    assert status == 5
    render = found["stages"]["render"]
    assert (render["rows"], render["seconds_per_row"], render["sure"]) == (40_000, 90, "published")
    assert render["gpu_hours"] == pytest.approx(1000)
    assert found["stages"]["sample"]["sure"] == "not known"
    assert [line.split(":")[0].split()[0] for line in found["missing"]] == [
        "reward.model", "reward.checklist.questions", "reward.checklist.weights", "sft.data", "queries.path",
    ]  # fmt: skip
    _, found, _ = planned(capsys, "vpo_cogvideox_5b", *cluster, "--set", "render.steps=25")
    assert found["stages"]["render"] == {
        **render, "rows": None, "rows_are": "expected", "gpu_hours": None, "hours": None, "balanced": 5,
        "seconds_per_row": 45, "sure": "scaled", "pool": [5, 5],
        "source": render["source"].replace("50 steps", "50 steps, taken to 25"),
    }  # fmt: skip


def test_text_says_what_is_not_here_and_no_number_is_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "vpo_cogvideox_2b", "--gpus", "8", "--gpu-type", "A100"]) == 5
    text = capsys.readouterr().out
    assert "queries     not known: they are not on this machine; give --queries N" in text
    assert "published   about 119.9 GB of weights; `vpo fetch" in text
    assert "(about 16.1 GB, licence: Meta Llama 3 Community, gated" in text
    assert "not here    5 of what the recipe names" in text
    assert "videos      not known how many of 49 x 720 x 480" in text
    assert "wall time   not known" in text


def test_queries_are_counted_without_words_that_are_not_here(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "blocked.txt"
    sets = [part for key, value in tiny.items() for part in ("--set", f"{key}={value}")]
    sets += ["--set", f"queries.rules.keywords={words}"]
    for more in ([], ["--queries", "10"]):
        status, found, _ = planned(capsys, "tiny", *sets, *more)
        assert status == 5
        assert found["missing"] == [f"queries.rules.keywords: cannot read {words}: No such file or directory"]
        assert found["stages"]["sample"]["rows"] > 0
        assert any(note.startswith("queries: at most") for note in found["notes"])
    words.write_text("")
    status, _, err = planned(capsys, "tiny", *sets)
    assert (status, "holds no word" in err) == (2, True)


@pytest.mark.parametrize("key", ["queries.path", "sft.data"])
def test_an_empty_path_is_not_the_working_directory(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    sets = [part for name, value in tiny.items() for part in ("--set", f"{name}={value}")]
    status, _, err = planned(capsys, "tiny", *sets, "--set", f"{key}=''")
    assert (status, f"{key} is empty: name a file, a glob or a folder" in err) == (2, True), err


def test_a_folder_in_the_place_of_a_file_is_told(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for name, value in tiny.items() for part in ("--set", f"{name}={value}")]
    status, _, err = planned(capsys, "tiny", *sets, "--set", f"reward.checklist.file={tmp_path}")
    assert (status, f"reward.checklist.file: {tmp_path} is a folder" in err) == (2, True), err


def test_what_is_wrong_is_no_plan_whatever_else_is_missing(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft.jsonl").write_text('{"query": "a"}\n', "utf-8")
    changed = {**tiny, "reward.model": tmp_path / "none"}
    sets = [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
    status, found, _ = planned(capsys, "tiny", *sets)
    assert (status, found["missing"]) == (5, [f"reward.model: no such folder: {tmp_path}/none"])
    status, found, err = planned(capsys, "tiny", *sets, "--set", f"sft.data={tmp_path}/sft.jsonl")
    assert (status, found) == (2, {})
    assert "2 problem(s)" in err
    with pytest.raises(PlanError, match="does not fit a cluster"):
        plan(recipe(changed, judge__pool__num_gpus=4), described(2, "H100"), incomplete=True)


def test_without_being_asked_a_plan_refuses_as_a_run_does(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"reward\.model"):
        plan(recipe(tiny, reward__model=tmp_path / "none"))


def test_queries_are_counted_by_what_the_recipe_takes_at_most(tiny: dict[str, Any], tmp_path: Path) -> None:
    away = recipe(tiny, queries__path=tmp_path / "none.txt", queries__splits="{dpo: 3, eval: 1}")
    assert plan(away, incomplete=True).queries is None
    made = plan(away, queries=100, incomplete=True)
    assert made.queries == {"sft": 0, "dpo": 75, "eval": 25}
    assert made.missing != []
    limited = recipe(tiny, queries__path=tmp_path / "none.txt", queries__limit=40)
    assert plan(limited, incomplete=True).queries == {"sft": 0, "dpo": 40, "eval": 0}
    assert plan(limited, queries=10, incomplete=True).queries == {"sft": 0, "dpo": 10, "eval": 0}
    here = plan(recipe(tiny), queries=10)
    assert (here.queries, here.missing) == ({"sft": 0, "dpo": 10, "eval": 0}, []), "of a list that is here"


def test_a_problem_of_a_file_that_is_here_is_not_its_absence(tmp_path: Path) -> None:
    named = load("tiny", [f"sft.data={tmp_path}/a.jsonl", f"reward.model={tmp_path}/m"])
    assert absent_sources(named)["sft.data"] == f"{tmp_path}/a.jsonl"
    lines = [f"sft.data: no such file: {tmp_path}/a.jsonl", f"x {tmp_path}/a.jsonl.gz: bad", "pair.margin: 3"]
    assert only_absent(named, lines) == (lines[:1], lines[1:])
    (tmp_path / "a.jsonl").write_text("{}\n", "utf-8")
    assert only_absent(named, lines) == ([], lines)
