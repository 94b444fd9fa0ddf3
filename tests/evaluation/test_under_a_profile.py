"""An evaluation whose policies are asked under a profile: they and the judge are told, and it is counted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion

from vpo_ray.evaluation.evaluate import evaluate
from vpo_ray.prompts.conditions import HEADING
from vpo_ray.recipe import Recipe, RecipeError, load
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
QUERIES = ["a red ball", "a long road through the hills behind the old town"]
PROFILES = {"short": {"share": 0.5, "max_words": 6}, "exact": {"share": 0.1, "keep_words": 1}}


def recipe_of(tmp_path: Path, profile: str, url: str = "http://127.0.0.1:9", **more: object) -> Recipe:
    (tmp_path / "set.txt").write_text("\n".join(QUERIES), "utf-8")
    endpoint = {"base_url": url, "api_key_env": None, "retries": 0}
    llm = {"model": "m", "backend": "openai", "endpoint": endpoint, "pool": {"size": 1, "num_cpus": 0.1}}
    evaluation = {
        "policies": {"query": {"kind": "query"}, "llm": {"kind": "endpoint", "llm": llm}},
        "sets": {"two": {"path": f"{tmp_path}/set.txt"}},
        "videos": False,
        "judge": llm,
        "resamples": 1000,
        "profile": profile,
        **more,
    }
    sets = [f"out={tmp_path}/run", "sft=null", "dpo=null", f"profiles={json.dumps(PROFILES)}"]
    return load(TINY, [*sets, f"evaluate={json.dumps(evaluation)}"])


@pytest.mark.ray
def test_policies_and_judge_are_told_and_what_is_met_is_counted(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Callable[[Callable[[Request], Reply]], EndpointServer]
) -> None:
    def answer(request: Request) -> Reply:
        text = request["messages"][-1]["content"]
        if "response_format" in request:
            return completion({"critique": "so", "missing": [], "added": [], "verdict": "aligned"})
        return completion("Rain falls." if HEADING in text else "Rain falls on a long and empty road.")

    server = serve_endpoint(answer)
    recipe = recipe_of(tmp_path, "short", server.url)
    found = evaluate(recipe, RunDir(recipe.out))
    results = found.results["results"]["two"]["render"]
    met = {name: of["prompt.profile_met"]["value"] for name, of in results.items()}
    assert met == {"query": 0.5, "llm": 1.0}
    # Two answers of the policy, and verdicts on the queries themselves and on its prompts.
    assert [HEADING in json.dumps(request) for request in server.requests] == [True] * 6
    assert all(row["verdict"] == "aligned" for row in found.samples()), "not met is no verdict"


@pytest.mark.parametrize(
    ("profile", "more", "message"),
    [
        ("shrot", {}, "evaluate.profile: no profile 'shrot'; profiles has short, exact"),
        ("exact", {"videos": True, "seeds": 2}, "evaluate.seeds: 1 with a profile that has keep_words"),
    ],
)
def test_a_profile_that_it_cannot_ask_under(
    tmp_path: Path, profile: str, more: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, profile, **more)
