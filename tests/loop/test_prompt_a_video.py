"""The recipe of Prompt-A-Video as it ships, on tiny checkpoints: evolve, SFT, pairs, DPO, a second round, an
evaluation. The LLM that writes and judges is a server here."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from endpoint_server import EndpointServer, Reply, Request, completion

from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row
from vpo_ray.stages.formula import raw_values
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.world import tiny_scorers

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
PAV = ROOT / "vpo_ray/data/recipes/prompt_a_video_cogvideox.yaml"
DIMENSIONS = ("visual_quality", "temporal_consistency", "factual_consistency", "dynamic_degree",
              "text_alignment")  # fmt: skip
FITNESS = {
    "visual_quality": 1,
    "temporal_consistency": 1,
    "factual_consistency": 1,
    "dynamic_degree": 0.5,
    "text_alignment": 1,
    "aesthetic": 5 / 8,
    "mps": 1 / 4,
}  # fmt: skip  booster/finetuning/gpt_boost.py
FILTER = {
    "visual_quality": 1,
    "temporal_consistency": 1,
    "factual_consistency": 1,
    "dynamic_degree": 1.1,
    "text_alignment": 1.3,
    "aesthetic": 4 / 5,
    "mps": 1 / 3,
}  # fmt: skip  booster/dpo/filter.py
GAP = 0.02


def answer(request: Request) -> Reply:
    """A judge that finds every prompt aligned, and an LLM that puts a query into two lights."""
    (query,) = (json.loads(found) for found in re.findall(r"<request>(.*?)</request>", said(request)))
    if "verdict" in json.dumps(request["response_format"]):
        return completion({"critique": "so", "missing": [], "added": [], "verdict": "aligned"})
    return completion({"prompts": [f"{query} in soft light.", f"{query}, at night in heavy rain, slowly."]})


def said(request: Request) -> str:
    text: str = request["messages"][0]["content"]
    return text


def recipe_at(folder: Path, tiny_models: Path, server: EndpointServer) -> Recipe:
    """The shipped recipe with what its size asks to be smaller, and thresholds that random weights pass."""
    tiny_scorers.make_tiny_clip(folder / "clip", "quick_gelu")
    tiny_scorers.make_tiny_heads(folder)
    tiny_scorers.make_tiny_mps(folder / "mps")
    tiny_scorers.make_tiny_videoscore(folder / "videoscore")
    (folder / "queries.txt").write_text("\n".join(f"a cat on roof number {n}" for n in range(24)), "utf-8")
    tiny = load(str(ROOT / "jobs/recipes/tiny.yaml")).dump()
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "timeout_s": 60}
    terms = {f"reward.{name}": {"weight": FILTER[name]} for name in DIMENSIONS}
    terms |= {name: {"weight": FILTER[name]} for name in ("aesthetic", "mps")}
    small = {"dtype": "float32", "workers": 1, "use_gpu": False, "resources_per_worker": {"CPU": 0.5},
             "global_batch": 4, "micro_batch": 2, "max_length": 512}  # fmt: skip
    values = {
        "out": folder / "run",
        "queries": {"path": str(folder / "queries.txt"), "splits": {"sft": 0.4, "dpo": 0.4, "eval": 0.2}},
        "policy.model": tiny_models / "policy",
        "evolve": {"preset": "prompt_a_video", "prompts": 2, "rounds": 1},
        "sft.data": "evolved",
        **{f"{phase}.{key}": value for phase in ("sft", "dpo") for key, value in small.items()},
        **{f"{part}.engine": tiny["sample"]["engine"] for part in ("sample", "serve")},
        **{f"{part}.pool": {"num_cpus": 0.3} for part in ("sample", "render", "reward", "serve")},
        **{f"{part}.max_tokens": 40 for part in ("sample", "serve")},
        "judge": {"model": "m", "backend": "openai", "endpoint": endpoint, "refine": False,
                  "engine": {"batch_size": 4}, "pool": {"num_cpus": 0.1}},
        "render.model": tiny_models / "video",
        **{f"render.{key}": tiny["render"][key] for key in ("dtype", "frames", "height", "width")},
        "render.steps": 2,
        "render.max_text_tokens": tiny["render"]["max_text_tokens"],
        "render.store": folder / "videos",
        "reward.model": folder / "videoscore",
        "reward.dtype": "float32",
        "reward.options.query_prompt": folder / "videoscore/query_prompt.txt",
        "more_rewards.aesthetic.options": {"clip": f"{folder}/clip", "head": f"{folder}/v1.safetensors",
                                           "variant": "v1"},
        "more_rewards.mps.model": folder / "mps",
        "more_rewards.mps.dtype": "float32",
        "formula": {"terms": terms},
        "pair.margin": GAP,
        "evaluate": {"policies": ["query", "sft", "dpo"],
                     "rewards": {"motion": {"kind": "vbench", "dimensions": ["temporal_flickering"]}}},
    }  # fmt: skip
    sets = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    return load(str(PAV), sets)


def vpo(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vpo_ray.cli", *words], cwd=ROOT, timeout=1800, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def total(row: Row, weights: dict[str, float]) -> float:
    values = raw_values(row)
    return sum(
        weight * values[f"reward.{name}" if name in DIMENSIONS else name] for name, weight in weights.items()
    )


def test_it_evolves_learns_twice_and_is_evaluated(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Callable[[Callable[[Request], Reply]], EndpointServer]
) -> None:
    server = serve_endpoint(answer)
    recipe = recipe_at(tmp_path, tiny_models, server)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()), "utf-8")
    vpo("plan", str(path))
    vpo("run", str(path), "--rounds", "2")
    run = RunDir(recipe.out)
    second = RunDir(run.at("rounds/2"))

    evolved = list(run.table("evolutions").rows())
    targets = {(row["query"], row["prompt"]) for row in evolved if row["target"]}
    assert targets
    assert {(row["query"], row["prompt"]) for row in run.table("sft").rows()} == targets
    scored = {row["candidate_id"]: row for row in RunDir(run.at("evolution/scored")).table("feedback").rows()}
    for row in evolved:
        assert row["fitness"] == pytest.approx(total(scored[row["prompt_id"]], FITNESS))

    for number, each in enumerate((run, second), 1):
        assert reconcile(build_ledger(each, recipe)) == [], number
        rows = {row["candidate_id"]: row for row in each.table("feedback").rows()}
        pairs = list(each.table("pairs").rows())
        assert pairs, number
        for pair in pairs:
            chosen, rejected = (total(rows[pair[f"{which}_id"]], FILTER) for which in ("chosen", "rejected"))
            assert chosen > rejected + GAP
            assert len(pair["chosen"].split()) <= 130
        for one in Path(each.at("checkpoints/dpo")).glob("*adapter*"):
            pytest.fail(f"{one} is no whole model")
        assert Path(each.at("checkpoints/dpo/model.safetensors")).is_file()
    assert second.read_json("round.json")["start"]["policy"] == run.at("checkpoints/dpo")
    assert second.read_json("example.json")["dpo"]

    asked = len(server.requests)
    vpo("run", str(path), "--rounds", "2")
    assert len(server.requests) == asked, "a second call asks for nothing"
    vpo("evaluate", str(path))
    found = run.read_json(run.read_json("evaluation.json")["results"])
    results = found["results"]["eval"]["render"]
    for policy in ("query", "sft", "dpo"):
        assert {"formula", "mps", "aesthetic"} <= set(results[policy])
