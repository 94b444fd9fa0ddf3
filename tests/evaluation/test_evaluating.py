"""An evaluation with real engines on tiny weights: every prompt is judged, rendered and scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.evaluation.evaluate import Evaluated, evaluate
from vpo_ray.evaluation.grid import in_full
from vpo_ray.evaluation.sets import SetError
from vpo_ray.loop.ledger import reconcile
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.phases import curate_queries
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import EvaluatedPolicy, Recipe, load
from vpo_ray.records import query_id
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
QUERIES = ["a cat on a roof", "rain", 'a "quoted" dog <b>', "海边的日落"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_sets: list[str]) -> Recipe:
    """The user's words against prompts of a file, on a file of queries."""
    (tmp_path / "queries.txt").write_text("\n".join(f"train {n}" for n in range(8)), "utf-8")
    (tmp_path / "set.txt").write_text("\n".join(QUERIES), "utf-8")
    longer = [{"query": query, "prompt": f"{query}, in the evening light, slowly"} for query in QUERIES]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, longer)), "utf-8")
    evaluation = {
        "policies": {
            "query": {"kind": "query"},
            "theirs": {"kind": "file", "path": f"{tmp_path}/prompts.jsonl"},
        },
        "sets": {"four": {"path": f"{tmp_path}/set.txt"}},
        "rewards": {"steady": {"kind": "vbench", "dimensions": ["temporal_flickering"]}},
        "resamples": 1000,
    }
    sets = [
        f"out={tmp_path}/run",
        f"queries.path={tmp_path}/queries.txt",
        "sft=null",
        "dpo=null",
        "queries.splits={dpo: 1}",
    ]
    return load(TINY, [*tiny_sets[1::2], *sets, f"evaluate={json.dumps(evaluation)}"])


def evaluated(recipe: Recipe) -> Evaluated:
    run = open_run(recipe)
    curate_queries(recipe, run)
    return evaluate(recipe, run)


def without_date(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "date"}


@pytest.mark.engine
@pytest.mark.ray
def test_every_prompt_of_every_policy_is_scored(ray_cluster: None, recipe: Recipe) -> None:
    found = evaluated(recipe)
    samples = found.samples()
    assert len(samples) == 2 * len(QUERIES)
    by_policy = {
        name: {row["query_id"]: row for row in samples if row["policy"] == name}
        for name in ("query", "theirs")
    }
    for query in QUERIES:
        one, other = (by_policy[name][query_id(query)] for name in by_policy)
        assert (one["prompt"], other["prompt"]) == (query, f"{query}, in the evening light, slowly")
    for row in samples:
        values = {measure["name"]: measure["value"] for measure in row["measures"]}
        # Random weights judge: whatever they say, there is a video, but of what is called unsafe.
        assert (row["video_key"] is None) == (row["verdict"] == "unsafe")
        assert row["error"] is None or row["error_stage"] == "judge"
        if row["video_key"] is not None:
            assert 0 <= values["steady.temporal_flickering"] <= 1
            assert "reward" in values
        assert values["prompt.words"] > 0
    assert found.results["results"]["four"]["render"].keys() == {"query", "theirs"}
    for folder in Path(recipe.out, "evaluation").iterdir():
        if (folder / "ledger.json").exists():
            assert reconcile(json.loads((folder / "ledger.json").read_text("utf-8"))) == []

    again = evaluated(recipe)
    assert without_date(again.results) == without_date(found.results)
    assert again.samples() == samples
    assert not list(Path(recipe.out, "videos").glob("*.tmp"))


def with_sft(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with the tiny recipe's SFT, and with another evaluation."""
    sft = load(TINY).sft
    assert recipe.evaluate is not None
    assert sft is not None
    data = str(Path(__file__).parents[2] / "vpo_ray/data/sft.jsonl")
    evaluation = recipe.evaluate.model_copy(update=changes)
    return recipe.model_copy(update={"sft": sft.model_copy(update={"data": data}), "evaluate": evaluation})


def test_what_was_trained_on_is_no_set(recipe: Recipe) -> None:
    run = open_run(recipe)
    curate_queries(recipe, run)
    run.table("sft").append([{"query_id": query_id("rain"), "query": "rain", "prompt": "rain falls"}])
    run.write_json("checkpoints/sft/vpo.json", {})
    with pytest.raises(SetError, match="rain"):
        evaluate(with_sft(recipe, policies={"sft": EvaluatedPolicy(kind="sft")}), run)


def test_an_untrained_policy_is_refused(recipe: Recipe) -> None:
    run = open_run(recipe)
    curate_queries(recipe, run)
    with pytest.raises(LoopError, match=r"checkpoints/sft is not there: train first"):
        evaluate(with_sft(recipe, policies={}), run)


def test_no_query_of_the_eval_split(recipe: Recipe) -> None:
    run = open_run(recipe)
    curate_queries(recipe, run)
    with pytest.raises(SetError, match=r"no query of the eval split: give queries\.splits\.eval a share"):
        evaluate(recipe.model_copy(update={"evaluate": None}), run)
    assert not RunDir(recipe.out).exists("evaluation.json")


def test_a_further_video_model_has_a_store_of_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    tiny = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
    other = {"kind": "openai", "model": "m", "store": str(tmp_path / "theirs")}
    recipe = load(tiny, [f"out={run.uri}", f"evaluate.transfer.other={json.dumps(other)}"])
    assert recipe.evaluate is not None
    transfer = recipe.evaluate.transfer["other"]
    assert in_full(transfer, recipe, run).store == str(tmp_path / "theirs")
    assert in_full(transfer.model_copy(update={"store": None}), recipe, run).store == run.at("videos")
