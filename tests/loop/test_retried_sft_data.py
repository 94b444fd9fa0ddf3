"""`--retry-errors` once the policy is sampled: SFT data stays, or candidates would be of another policy."""

from pathlib import Path
from typing import Any

import pytest

from vpo_ray.loop import phases
from vpo_ray.loop.evolution import Evolving, evolve_prompts
from vpo_ray.loop.policies import LoopError, policy_id
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id
from vpo_ray.storage.run_dir import RunDir

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
DRAFTS = ("sft.data=null", "draft={examples: vpo_ray/data/sft.jsonl}")
EVOLVED = ("sft.data=evolved", "evolve={llm: {backend: openai, model: m, endpoint: {base_url: http://a/v1}}}")


def draft(query: str, target: str | None) -> Row:
    row = {"draft_id": query_id(query), "query_id": query_id(query), "query": query, "seed": 0}
    failed = {"error": "ChatError: 503", "error_stage": "draft"} if target is None else {}
    return {**row, "target": target, **failed}


def candidate(query: str) -> Row:
    return {"candidate_id": f"{query}-0", "query_id": query_id(query), "query": query, "k": 0, "seed": 0}


def recipe_at(folder: Path, *sets: str) -> Recipe:
    return load(TINY, [f"out={folder / 'run'}", "policy.model=some/model", *sets])


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_that_failed_stay_so_once_the_policy_is_sampled(
    sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_at(tmp_path, *DRAFTS)
    run = RunDir(recipe.out)
    run.table("drafts").append([draft("a cat", "A cat naps."), draft("a dog", None)])
    before = policy_id(recipe, run)
    if sampled:
        run.table("candidates").append([candidate("a cat")])

    def generate(recipe: Recipe, run: RunDir, models: Any, stages: Any, retry_errors: bool) -> Any:
        if retry_errors:
            run.table("drafts").append([draft("a dog", "A dog runs.")])
        return {}

    monkeypatch.setattr("vpo_ray.stream.pipeline.generate", generate)
    phases.draft_sft(recipe, run, retry_errors=True)
    assert (policy_id(recipe, run) == before) == sampled
    assert ("drafts that failed are not taken again" in caplog.text) == sampled


@pytest.mark.parametrize("sampled", [False, True])
def test_prompts_of_an_evolution_that_failed_stay_so_once_the_policy_is_sampled(
    sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_at(tmp_path, *EVOLVED)
    run = RunDir(recipe.out)
    query = {"query_id": query_id("a cat"), "query": "a cat", "source": "t", "split": "sft"}
    run.table("queries").append([query])
    if sampled:
        run.table("candidates").append([candidate("a cat")])
    retried: list[bool] = []
    monkeypatch.setattr(Evolving, "run_all", lambda self, retry_errors: retried.append(retry_errors))
    with pytest.raises(LoopError, match="no evolved prompt is fit"):
        evolve_prompts(recipe, run, retry_errors=True)
    assert retried == [not sampled]
