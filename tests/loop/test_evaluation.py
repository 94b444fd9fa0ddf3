"""Policies before and after DPO on queries that nothing was trained on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_ray import cli
from vpo_ray.loop.evaluation import compare, evaluate, summary
from vpo_ray.loop.ledger import reconcile
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.phases import curate_queries, starting_policy
from vpo_ray.loop.policies import LoopError, Start, dpo_id
from vpo_ray.recipe import Recipe, load
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


def recipe_of(folder: Path, *more: str) -> Recipe:
    queries = folder / "queries.txt"
    queries.write_text("\n".join(f"a cat, number {n}" for n in range(40)))
    sets = [f"out={folder / 'run'}", f"queries.path={queries}", "queries.splits={dpo: 0.5, eval: 0.5}"]
    return load(TINY, [*sets, "sft=null", *more])


def test_scores_are_compared_query_by_query() -> None:
    before = {"a": 1.0, "b": 2.0, "c": 3.0, "only before": 9.0}
    after = {"a": 2.0, "b": 2.0, "c": 2.5, "only after": -9.0}
    assert compare(before, after) == {
        "compared": 3,
        "better": 1,
        "equal": 1,
        "worse": 1,
        "difference": pytest.approx(0.5 / 3),
    }
    assert compare({"a": 1.0}, {"b": 1.0})["difference"] is None


def test_nothing_is_evaluated_before_there_is_a_trained_policy(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run = open_run(recipe)
    with pytest.raises(LoopError, match="no query of the eval split"):
        evaluate(recipe, run)
    curate_queries(recipe, run)
    with pytest.raises(LoopError, match=r"checkpoints/dpo is not there: train first"):
        evaluate(recipe, run)


def write_feedback(recipe: Recipe, run: RunDir, start: Start, score: float) -> RunDir:
    """What a finished evaluation of a policy leaves: then no engine has to be started."""
    folder = RunDir(run.at(f"evaluation/{start.identity}"))
    once = recipe.sample.model_copy(update={"k": 1})
    queries = sorted(
        (row for row in run.table("queries").rows() if row["split"] == "eval"),
        key=lambda row: row["query_id"],
    )
    rows = []
    for n, query in enumerate(queries):
        for row in candidates(query, once, start.identity, recipe.seed):
            made: dict[str, Any] = {"verdict": "aligned", "score": score if n else 1.0}
            rows.append({**row, "prompt": "x", **(made if n != 1 else {"verdict": "unsafe"})})
    folder.table("feedback").append(rows)
    return folder


@pytest.mark.ray
def test_only_the_eval_split_is_asked_and_each_policy_once(ray_cluster: None, tmp_path: Path) -> None:
    """Real streams that find everything done."""
    recipe = recipe_of(tmp_path, "render.strategy=adaptive")
    run = open_run(recipe)
    curate_queries(recipe, run)
    run.write_json("checkpoints/dpo/vpo.json", {})
    before = starting_policy(recipe, run)
    after = Start(run.at("checkpoints/dpo"), dpo_id(recipe, run, before))
    folders = [write_feedback(recipe, run, start, score) for start, score in ((before, 1.0), (after, 2.0))]
    held_out = {row["query_id"] for row in run.table("queries").rows() if row["split"] == "eval"}
    n = len(held_out)
    assert 10 < n < 30

    result = evaluate(recipe, run)
    assert result["queries"] == n
    assert (result["compared"], result["better"], result["equal"], result["worse"]) == (n - 1, n - 2, 1, 0)
    assert result["before"]["verdicts"] == {"aligned": n - 1, "unsafe": 1}
    assert (result["before"]["policy"], result["after"]["policy"]) == (before.policy, after.policy)
    assert run.read_json("evaluation.json") == result
    assert f"after DPO {n - 2} of {n - 1} videos score better" in summary(result)
    for folder in folders:
        assert {row["query_id"] for row in folder.table("queries").rows()} == held_out
        own = yaml.safe_load(folder.read("recipe.yaml"))
        assert (own["sample"]["k"], own["render"]["strategy"]) == (1, "all")
        assert own["render"]["store"] == run.at("videos"), "a video of the run is not rendered twice"
        assert own["seed"] == recipe.seed, "both policies' videos of a query share their seed"
        assert reconcile(folder.read_json("ledger.json")) == []

    assert evaluate(recipe, run) == result
    assert [folder.table("feedback").count() for folder in folders] == [n, n]


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", TINY, "--out", str(tmp_path), "--set", "seed=zero"]) == 2
    assert "seed" in capsys.readouterr().err
