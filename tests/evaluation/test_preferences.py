"""What an LLM prefers, as rows of COMPARISON: every two policies in both orders, asked once for all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion

from vpo_ray.evaluation.blocks import blocks
from vpo_ray.evaluation.preference_figures import preferences
from vpo_ray.evaluation.preferences import prefer
from vpo_ray.evaluation.samples import COMPARISON, SAMPLE
from vpo_ray.evaluation.statistics import both_orders, flip_rate
from vpo_ray.loop.ledger import reconcile
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id, table
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.spending import endpoint_cost

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


def sample(policy: str, query: str, prompt: str | None, **more: Any) -> Row:
    row = {"set": "eval", "video_model": "render", "seed": 0, "policy": policy, "query": query}
    return {
        **dict.fromkeys(SAMPLE.names),
        **row,
        "query_id": query_id(query),
        "sample_id": f"{policy} {query}",
        "prompt": prompt,
        **more,
    }


def recipe_for(folder: Path, url: str, key: str = "prefer_prompts", **more: Any) -> Recipe:
    endpoint = {"base_url": url, "api_key_env": None, "retries": 0, "prompt_price": 1.0}
    llm = {"model": "m", "backend": "openai", "endpoint": endpoint, "pool": {"size": 1, "num_cpus": 0.1}}
    evaluate = {"policies": ["query", "base", "dpo"], key: {"llm": llm, **more}}
    return load(TINY, [f"out={folder / 'run'}", f"evaluate={json.dumps(evaluate)}"])


def by_pair(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    found = {(row["query"], row["a"], row["b"]): row for row in rows}
    assert len(found) == len(rows)
    assert table(rows, COMPARISON).num_rows == len(rows)
    assert len({row["comparison_id"] for row in rows}) == len(rows)
    return found


def test_what_is_absent_or_equal_is_not_asked(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "http://127.0.0.1:9")
    samples = [
        *(sample(name, "a cat", "A cat.") for name in ("query", "base")),
        *(sample(name, "a dog", text) for name, text in (("query", "a dog"), ("base", None))),
        *(sample(name, "a bird", None) for name in ("query", "base")),
    ]
    found = by_pair(prefer(recipe, RunDir(recipe.out), samples, "prompt"))
    assert {key: row["answer"] for key, row in found.items()} == {
        ("a cat", "query", "base"): "tie",
        ("a cat", "base", "query"): "tie",
        ("a dog", "query", "base"): "a",
        ("a dog", "base", "query"): "b",
        ("a bird", "query", "base"): "tie",
        ("a bird", "base", "query"): "tie",
    }
    assert recipe.evaluate is not None
    (block,) = blocks(samples, ["query", "base"], {})
    ((compared,), _) = preferences(block, list(found.values()), False, recipe.evaluate)
    assert [compared[name] for name in ("win", "tie", "loss")].count(1) == 1
    assert compared["tie"] == 2
    assert compared["flip_rate"] is None, "what was not asked cannot flip"


def test_pairs_are_of_one_place_and_with_one_policy_where_that_is_asked(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    names = ("query", "base", "dpo")
    places = [
        {"set": set, "video_model": model, "seed": seed}
        for set in ("eval", "other")
        for model in ("render", "wan")
        for seed in (0, 1)
    ]
    samples = [sample(name, "a cat", "A cat.", video_key="k", **place) for name in names for place in places]
    all_pairs = prefer(recipe_for(tmp_path, "http://127.0.0.1:9"), run, samples, "prompt")
    assert [(row["a"], row["b"]) for row in all_pairs if row["set"] == "eval"] == [
        *(("query", "base"), ("base", "query")),
        *(("query", "dpo"), ("dpo", "query")),
        *(("base", "dpo"), ("dpo", "base")),
    ]
    assert {(row["video_model"], row["seed"]) for row in all_pairs} == {("render", 0)}, "one prompt a query"
    against = recipe_for(tmp_path, "http://127.0.0.1:9", "prefer_videos", against="dpo")
    videos = prefer(against, run, samples, "video")
    assert len(videos) == 8 * 2 * 2
    assert all("dpo" in (row["a"], row["b"]) for row in videos)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_an_llm_of_the_cluster_prefers_prompts(
    tmp_path: Path, tiny_models: Path, tiny_sets: list[str], ray_cluster: None
) -> None:
    """Its weights are random: what counts is that every question has an answer, and the same again."""
    judge = load(TINY, tiny_sets[1::2]).judge
    llm = judge.model_dump(include={"model", "engine", "pool"}, exclude_defaults=True)
    evaluate = {"policies": ["query", "base"], "prefer_prompts": {"llm": llm}}
    recipe = load(TINY, [*tiny_sets[1::2], f"out={tmp_path / 'run'}", f"evaluate={json.dumps(evaluate)}"])
    queries = ["a cat", "a dog", "a bird"]
    samples = [
        sample(name, query, f"{query}{more}")
        for name, more in (("query", ""), ("base", ", at night"))
        for query in queries
    ]
    rows = prefer(recipe, RunDir(recipe.out), samples, "prompt")
    assert len(rows) == 6
    assert {row["answer"] for row in rows} <= {"a", "b", "tie"}, [row["error"] for row in rows]
    assert all("reason" in json.loads(row["raw"]) for row in rows)
    assert prefer(recipe, RunDir(recipe.out), samples, "prompt") == rows


@pytest.mark.slow
@pytest.mark.ray
def test_both_orders_are_asked_once_and_a_place_is_no_preference(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve, clip: Callable[..., bytes]
) -> None:
    def first_or_red(request: Request) -> Reply:
        """Prefers what is shown first, but for a prompt that says red."""
        content = request["messages"][0]["content"]
        second = content if isinstance(content, str) else ""
        red = second.partition("<prompt_2>")[2].partition("</prompt_2>")[0].count("red")
        return completion({"reason": "so", "better": "2" if red else "1"})

    server = serve_endpoint(first_or_red)
    recipe = recipe_for(tmp_path, server.url)
    run = RunDir(recipe.out)
    samples = [
        sample(name, query, f"{query}{style}", set=set)
        for name, style in (("query", ""), ("base", ", in detail"), ("dpo", ", in red"))
        for set, query in (("eval", "a cat"), ("eval", "a dog"), ("other", "a cat"))
    ]
    rows = prefer(recipe, run, samples, "prompt")
    found = by_pair([row for row in rows if row["set"] == "eval"])
    assert len(server.requests) == 2 * 3 * 2, "a question of two sets is one"
    pairs = [("query", "base"), ("query", "dpo"), ("base", "dpo")]
    answers = {
        pair: [(found[q, a, b]["answer"], found[q, b, a]["answer"]) for q in ("a cat", "a dog")]
        for pair in pairs
        for a, b in [pair]
    }
    assert {both_orders(*orders) for orders in answers["query", "base"]} == {"tie"}
    assert flip_rate(answers["query", "base"]) == 1
    assert {both_orders(*orders) for orders in answers["base", "dpo"]} == {"b"}
    assert flip_rate(answers["base", "dpo"]) == 0
    assert {row["by"] for row in rows} == {"m"}
    assert "dpo" not in json.dumps(server.requests)

    folders = [name for name in (tmp_path / "run/evaluation").iterdir() if (name / "ledger.json").exists()]
    ledger = json.loads((folders[0] / "ledger.json").read_text("utf-8"))
    assert reconcile(ledger) == []
    assert ledger["stages"]["prefer"]["out"] == 12
    assert sum(ledger["stages"]["prefer"]["answers"].values()) == 12
    assert endpoint_cost(RunDir(str(folders[0]))) == pytest.approx(12 / 1000)

    assert prefer(recipe, run, samples, "prompt") == rows
    assert len(server.requests) == 12, "again asks nothing"
    prefer(recipe, run, [*samples, *(sample(n, "a bird", n) for n in ("query", "base"))], "prompt")
    assert len(server.requests) == 14, "another query asks for itself alone"

    (tmp_path / "one.mp4").write_bytes(clip(1))
    (tmp_path / "two.mp4").write_bytes(clip(2))
    videos = [
        sample(name, "a cat", "x", video_key=key, video_uri=str(tmp_path / f"{key}.mp4"))
        for name, key in (("query", "one"), ("dpo", "two"), ("base", "gone"))
    ]
    seen = by_pair(prefer(recipe_for(tmp_path, server.url, "prefer_videos"), run, videos, "video"))
    assert [seen["a cat", *pair]["answer"] for pair in (("query", "dpo"), ("dpo", "query"))] == ["a", "a"]
    assert seen["a cat", "query", "base"]["answer"] is None
    assert "gone.mp4" in seen["a cat", "query", "base"]["error"]
    assert len(server.requests) == 16
