"""A run whose queries have images, with a judge behind an endpoint: what is asked, kept and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion
from PIL import Image

from vpo_ray.files.image_files import data_uri
from vpo_ray.loop.phases import curate_queries
from vpo_ray.recipe import load
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.pipeline import Models, generate
from vpo_ray.world import tiny

pytestmark = pytest.mark.ray

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
VERDICT = {"critique": "so", "missing": [], "added": [], "verdict": "aligned"}


@pytest.mark.parametrize("images", ["show", "ignore"])
def test_a_judge_sees_the_image_of_a_query(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve, images: str
) -> None:
    server = serve_endpoint(lambda _: completion(VERDICT))
    Image.new("RGB", (6, 4), "red").save(tmp_path / "red.png")
    rows = [{"query": "a cat", "image": "red.png"}, {"query": "a cat"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "timeout_s": 20}
    judge = {"model": "m", "backend": "openai", "endpoint": endpoint, "images": images,
             "pool": {"size": 1, "num_cpus": 0.1}}  # fmt: skip
    queries = {"path": str(tmp_path / "q.jsonl"), "image_column": "image"}
    sets = [f"{key}={json.dumps(value)}" for key, value in {"judge": judge, "queries": queries}.items()]
    recipe = load(TINY, [f"out={tmp_path}/run", *sets])
    run = RunDir(recipe.out)
    curate_queries(recipe, run)
    for row in run.table("queries").rows():
        sampled: dict[str, Any] = {"candidate_id": row["query_id"], "k": 0, "seed": 1, "prompt": "A cat."}
        names = ("query_id", "query", "image", "unsafe")
        run.table("candidates").append([{**{name: row[name] for name in names}, **sampled}])
    generate(recipe, run, Models("nowhere", "p"), ("judge",))
    judged = {row["image"]: row for row in run.table("verdicts").rows()}
    assert [row["verdict"] for row in judged.values()] == ["aligned"] * 2, judged
    (name,) = [name for name in judged if name is not None]
    contents = [request["messages"][0]["content"] for request in server.requests]
    shown = [content for content in contents if isinstance(content, list)]
    if images == "ignore":
        assert shown == []
        return
    assert len(contents) == 2
    (content,) = shown
    assert content[0]["image_url"]["url"] == data_uri(name, images_of(run).read(name))
    assert "begins with it" in content[1]["text"]
    assert "A cat." in content[2]["text"]


@pytest.mark.slow
@pytest.mark.engine
def test_a_policy_that_sees_samples_with_the_image(tmp_path: Path, ray_cluster: None) -> None:
    """A tiny Idefics3 on vLLM, with the task prompt around query and image."""
    tiny.make_vlm(tmp_path / "vlm")
    rows: list[dict[str, Any]] = [{"query": "a cat"}]
    for colour in ("red", "blue"):
        Image.new("RGB", (120, 90), colour).save(tmp_path / f"{colour}.png")
        rows.append({"query": "a cat", "image": f"{colour}.png"})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    queries = {"path": str(tmp_path / "q.jsonl"), "image_column": "image"}
    sets = [f"queries={json.dumps(queries)}", "sft=null", "dpo=null", "evaluate=null", "sample.k=1"]
    sets += [f"policy.model={tmp_path}/vlm", "sample.temperature=0", "sample.max_tokens=24"]
    recipe = load(TINY, [f"out={tmp_path}/run", *sets])
    run = RunDir(recipe.out)
    curate_queries(recipe, run)
    generate(recipe, run, Models(recipe.policy.model, "p"), ("sample",))
    found = list(run.table("candidates").rows())
    assert [row["error"] for row in found] == [None] * 3
    none, *shown = sorted(found, key=lambda row: row["image"] or "")
    assert len({row["prompt"] for row in found}) == 3, "an image changes what is written"
    assert shown[0]["prompt_tokens"] == shown[1]["prompt_tokens"] > none["prompt_tokens"] + 20
