"""A run whose gate looks first, and whose rewards are an endpoint, a server and the prompt itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from endpoint_server import EndpointServer, Reply, Request, VideoServer, completion

from vpo_ray.engines.video.engine import encode
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import FEEDBACK, query_id
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.spending import endpoint_cost

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
MODELS = Models("nowhere", "test-policy")
PROMPTS = ["cat", "a cat in the sun", "a dog", "a dog on the mat", "babble to the end", "a boat and a bird"]
REASON = "below the gate: length under 1"
PRICE = 1.0


def marks(request: Request) -> Reply:
    # What an endpoint sees of a video is its frames, so that a row's own answer goes by its query.
    text = request["messages"][0]["content"][-1]["text"]
    return completion("it depends" if "query 4" in text else "look: 4\nmotion: 2")


@pytest.fixture
def servers() -> Iterator[dict[str, EndpointServer]]:
    grey = encode(np.full((9, 32, 48, 3), 90, np.uint8), 8, 17)
    made = {
        "video": VideoServer(lambda fields: grey, polls=1),
        "marks": EndpointServer(marks),
        "scorer": EndpointServer(lambda _: Reply({"dimensions": {"grey": 0.5}})),
    }
    made["scorer"].reply_to = lambda method, path, request: (  # type: ignore[method-assign]
        Reply({"name": "grey"}) if method == "GET" else Reply({"dimensions": {"grey": 0.5}})
    )
    yield made
    for server in made.values():
        server.close()


def recipe_for(folder: Path, servers: dict[str, EndpointServer], *more: str) -> Recipe:
    (folder / "template.txt").write_text("Rate it: {query}", "utf-8")
    endpoint = {"api_key_env": None, "retries": 0, "timeout_s": 20}
    video = {**endpoint, "base_url": servers["video"].url, "request": {"size": "48x32", "num_frames": 9}}
    written = {**endpoint, "base_url": servers["marks"].url, "prompt_price": PRICE}
    pool = {"num_cpus": 0.1}
    options = {"template": str(folder / "template.txt"), "frames": 2, "dimensions": ["look", "motion"]}
    sections = {
        "render": {"kind": "openai", "model": "grey", "version": "1", "endpoint": video, "pool": pool},
        "gate": {"options": {"words": [3, 9]}, "least": {"length": 1}},
        "reward": {"kind": "generative", "model": "m", "endpoint": written, "options": options, "pool": pool},
        "more_rewards": {
            "own": {"kind": "http", "endpoint": {**endpoint, "base_url": servers["scorer"].url}},
            "kept": {"kind": "text", "options": {"words": [5, 9]}},
        },
        "pair": {"dominance": "dimension"},
    }
    sets = [f"{key}={json.dumps(value)}" for key, value in sections.items()]
    return load(TINY, [*sets, f"out={folder / 'run'}", "sft=null", "limits.max_error_share=1", *more])


def run_of(recipe: Recipe) -> RunDir:
    run, rows = RunDir(recipe.out), []
    for k, prompt in enumerate(PROMPTS):
        query = f"query {k}"
        row = {"candidate_id": f"{k}" * 32, "query_id": query_id(query), "query": query, "k": k, "seed": 5}
        rows.append({**dict.fromkeys(FEEDBACK.names), **row, "prompt": prompt, "verdict": "aligned"})
    run.table("verdicts").append(rows)
    return run


def test_a_run_is_gated_scored_and_paid_for(
    tmp_path: Path, ray_cluster: None, servers: dict[str, EndpointServer]
) -> None:
    recipe = recipe_for(tmp_path, servers)
    run = run_of(recipe)
    generate(recipe, run, MODELS, ("render", "score"))
    rows = sorted(run.table("feedback").rows(), key=lambda row: row["k"])
    assert [row["skipped"] for row in rows] == [REASON, None, REASON, None, None, None]
    assert len(servers["video"].requests) == 4
    assert [row["score"] for row in rows] == [None, 3.0, None, 3.0, None, 3.0]
    assert (rows[4]["error_stage"], rows[4]["more_rewards"]) == ("score", None)
    assert "the answer has no look, motion: 'it depends'" in rows[4]["error"]
    assert rows[1]["dimensions"] == [{"name": "look", "score": 4.0}, {"name": "motion", "score": 2.0}]
    assert rows[1]["reward"] == "vpo_ray.engines.reward.generative:Generative@1"
    more = {reward["name"]: reward["score"] for reward in rows[1]["more_rewards"]}
    assert more == {"own": 0.5, "kept": 1.0}
    stages = build_ledger(run, recipe)["stages"]
    assert stages["render"]["skipped"] == {REASON: 2}
    assert stages["score"]["requests"] == len(servers["marks"].requests) == 4
    assert endpoint_cost(run) == pytest.approx(4 * PRICE / 1000), "the answer that could not be read too"
    assert json.loads(run.read("made_with/score.json"))["more_rewards.own.kind"].endswith('{"name": "grey"}')

    count = len(servers["marks"].requests)
    generate(recipe, run, MODELS, ("render", "score"))
    assert len(servers["marks"].requests) == count, "a second call asks nothing"


def test_a_scorer_that_is_down_stops_the_run_with_its_address(
    tmp_path: Path, ray_cluster: None, servers: dict[str, EndpointServer]
) -> None:
    recipe = recipe_for(tmp_path, servers, "more_rewards.own.endpoint.base_url=http://127.0.0.1:9")
    with pytest.raises(GenerationError, match=r"cannot reach http://127\.0\.0\.1:9"):
        generate(recipe, run_of(recipe), MODELS, ("render", "score"))
