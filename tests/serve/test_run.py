"""The endpoint as a command starts it: what is checked first, and the one query that ends a run."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_costs import Alone, Engine
from tiny_endpoint import TINY

from vpo_ray.loop.phases import write_example
from vpo_ray.recipe import load
from vpo_ray.recipe.serve import Feedback
from vpo_ray.records import FEEDBACK
from vpo_ray.serve.answer_ids import SecretMissing
from vpo_ray.serve.app import ingress_app
from vpo_ray.serve.run import alone, check_settings
from vpo_ray.storage.run_dir import RunDir

ELSEWHERE: list[dict[str, Any]] = [
    {"videos": {"store": "/nowhere"}},
    {"keys": "/nowhere/keys", "feedback": {"store": "/nowhere", "secret_env": "VPO_NOT_SET"}},
    {"safety": {"query": "refuse", "keywords": "/nowhere/words"}},
    {"best_of": {"judge": {"model": "m", "endpoint": {"api_key_env": "VPO_NOT_SET"}}}},
    {"canary": {"checkpoint": "/nowhere", "share": 0.5}},
    {"pool": {"size": [4, 8], "num_cpus": 2}, "ingress_replicas": 3},
]


@pytest.mark.parametrize("settings", ELSEWHERE, ids=lambda settings: next(iter(settings)))
def test_the_query_that_ends_a_run_needs_the_policy_alone(settings: dict[str, Any]) -> None:
    """Keys, services and files of the endpoint need not be where the policy is trained."""
    recipe = load(TINY)
    serve = recipe.serve.model_validate({**recipe.serve.model_dump(), **settings, "max_tokens": 77})
    mine = alone(serve)
    check_settings(mine)
    ingress_app(None, None, mine, ())

    async def start() -> None:
        Alone(Engine(), None, None, mine, ())

    asyncio.run(start())
    assert mine.canary is None
    assert (mine.max_tokens, mine.engine, mine.pool.num_cpus) == (77, serve.engine, serve.pool.num_cpus)
    assert (mine.host, mine.port, mine.pool.size, mine.ingress_replicas) == ("127.0.0.1", 0, (1, 1), 1)


def test_the_query_that_ends_a_run_is_answered_by_the_policy_or_not_at_all() -> None:
    assert not alone(load(TINY, ["serve.fallback=true"]).serve).fallback


def test_a_missing_secret_is_told_before_replicas_start(tmp_path: Path) -> None:
    feedback = Feedback(store=str(tmp_path), secret_env="VPO_NOT_SET", anyone=True)
    with pytest.raises(SecretMissing, match="VPO_NOT_SET has no secret"):
        check_settings(load(TINY).serve.model_copy(update={"feedback": feedback}))


@pytest.mark.ray
@pytest.mark.engine
def test_a_cluster_with_an_endpoint_of_its_own_ends_a_run_without_that_query(
    url: str, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    asked = {"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 0, "prompt": "A cat."}
    row: dict[str, Any] = {**dict.fromkeys(FEEDBACK.names), **asked}
    run.table("candidates").append([row])
    write_example(load(TINY), run, checkpoint)
    assert not run.exists("example.json")
    assert "already runs on this cluster" in caplog.text
