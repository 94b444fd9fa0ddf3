"""The report of a run that learns from groups."""

from pathlib import Path

from vpo_ray.recipe import Recipe, load
from vpo_ray.report import build_report
from vpo_ray.storage.run_dir import GROUPED, RunDir

RECIPE = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
RL = "rl={epochs: 1, lr: 1.0e-6, global_batch: 4}"


def recipe(out: Path) -> Recipe:
    return load(RECIPE, [f"out={out}", "dpo=null", "pair={}", RL])


def test_groups_are_shown_with_their_rewards(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    prompts = ["A <b>red</b> ball rolls.", "A ball."]
    group = {
        "group_id": "g",
        "query_id": "q",
        "query": "red ball <script>",
        "candidate_ids": ["a", "b"],
        "prompts": prompts,
        "rewards": [1.0, 2.5],
        "advantages": [-0.7, 0.7],
    }
    run.table("groups").append([group])
    run.write_json(GROUPED, {"queries": {"all rewards are equal": 2}, "candidates": {"no score": 1}})
    page = Path(build_report(run, recipe(tmp_path))).read_text("utf-8")
    assert page.index("A ball.") < page.index("A &lt;b&gt;red&lt;/b&gt; ball rolls.")
    assert "red ball &lt;script&gt;" in page
    assert "all rewards are equal" in page
    assert "no pair" not in page


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    page = Path(build_report(RunDir(str(tmp_path)), recipe(tmp_path))).read_text("utf-8")
    assert "There is no group" in page
