"""Policies before and after DPO on queries that nothing was trained on."""

from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli, evaluation
from vpo_ray.evaluation import compare, evaluate, told
from vpo_ray.loop import LoopError, Start, curate_queries, open_run
from vpo_ray.recipe import Recipe, load
from vpo_ray.stages.sample import candidates
from vpo_ray.storage import RunDir

TINY = "jobs/recipes/tiny.yaml"


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


def test_only_the_eval_split_is_asked_and_each_policy_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stream is replaced by rows as it would leave them; a real one is in tests/nodes."""
    recipe = recipe_of(tmp_path, "render.strategy=adaptive")
    run = open_run(recipe)
    curate_queries(recipe, run)
    run.write_json("checkpoints/dpo/vpo.json", {})
    asked: list[tuple[Recipe, str]] = []

    def generate(own: Recipe, folder: RunDir, start: Start, retry_errors: bool) -> dict[str, Any]:
        asked.append((own, start.policy))
        trained = start.policy.endswith("checkpoints/dpo")
        rows = []
        for n, query in enumerate(folder.table("queries").rows()):
            for row in candidates(query, own.sample, start.identity, own.seed):
                made: dict[str, Any] = {
                    "prompt": "x",
                    "verdict": "aligned",
                    "score": 1.0 + trained * (n != 0),
                }
                if n == 1:
                    made = {"verdict": "unsafe"}
                rows.append({**row, **made})
        folder.table("feedback").append(rows)
        return {}

    monkeypatch.setattr(evaluation, "generate_feedback", generate)
    result = evaluate(recipe, run)
    held_out = {row["query_id"] for row in run.table("queries").rows() if row["split"] == "eval"}
    n = len(held_out)
    assert 10 < n < 30
    assert result["queries"] == n
    assert (result["compared"], result["better"], result["equal"]) == (n - 1, n - 2, 1)
    assert result["before"]["verdicts"] == {"aligned": n - 1, "unsafe": 1}
    assert run.read_json("evaluation.json") == result
    assert f"after DPO {n - 2} of {n - 1} videos score better" in told(result)
    assert [policy for _, policy in asked] == [recipe.policy.model, run.at("checkpoints/dpo")]
    for own, _ in asked:
        folder = RunDir(own.out)
        assert {row["query_id"] for row in folder.table("queries").rows()} == held_out
        assert (own.sample.k, own.render.strategy, own.render.store) == (1, "all", run.at("videos"))
        assert own.seed == recipe.seed, "both policies' videos of a query share their seed"
        assert folder.exists("ledger.json")

    # The same again: each policy's own directory is found, and no row is added.
    counts = [RunDir(own.out).table("feedback").count() for own, _ in asked]
    assert counts == [n, n]


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", TINY, "--out", str(tmp_path), "--set", "seed=zero"]) == 2
    assert "seed" in capsys.readouterr().err
