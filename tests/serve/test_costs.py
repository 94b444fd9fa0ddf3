"""What a request costs of its caller's limits, by route; an engine that answers at once stands behind."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from vpo_ray.recipe import Serve
from vpo_ray.serve.ingress import Ingress


class Engine:
    """The handle of a deployment whose replica writes `n` prompts."""

    def __init__(self) -> None:
        self.answer, self.bodies = self, list[dict[str, Any]]()

    def remote(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        choices = [{"message": {"content": f"prompt {number}"}} for number in range(body["n"])]

        async def answer() -> str:
            return json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 2}})

        return asyncio.ensure_future(answer())


class Jobs:
    """The handle of the deployment of jobs, which takes every one."""

    def __init__(self) -> None:
        self.submit = self

    async def remote(self, query: str, seed: int, owner: str, prompt: str | None, image: str | None) -> str:
        return "{}"


# Serve wraps the class in one that wants a replica around it.
PLAIN = next(base for base in Ingress.__mro__ if "_admitted" in base.__dict__)


class Alone(PLAIN):
    """The class without Serve around it, which would await its end."""

    def __del__(self) -> None:
        """Nothing is kept here."""


def cost(route: str, body: dict[str, Any], **settings: Any) -> float:
    """What a request takes of 1000 prompts a minute; it must be answered."""

    async def ask() -> float:
        chosen = Serve.model_validate({"requests_per_minute": 1000, "concurrency": 500, **settings})
        engine = Engine()
        ingress = Alone(engine, None, Jobs() if chosen.videos else None, chosen, ())
        data = json.dumps(body).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        response = await getattr(ingress, route)(Request(scope, receive))
        assert response.status_code < 300, response.body
        caller = ingress.limits._callers["anyone"]
        assert caller.running == 0
        spent = 1000 - caller.tokens
        if route != "make_video":
            assert spent == sum(asked["n"] for asked in engine.bodies), "what the engine was asked for"
        return float(spent)

    return asyncio.run(ask())


CHAT = {"model": "vpo", "messages": [{"role": "user", "content": "a cat"}]}
NOBODY = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": None, "timeout_s": 1, "retries": 0}
BEST = {"best_of": {"n": 4, "judge": {"model": "j", "endpoint": NOBODY}}}


@pytest.mark.parametrize(
    ("route", "body", "settings", "expected"),
    [
        ("optimize", {"query": "a cat"}, {}, 1),
        ("optimize", {"query": "a cat", "n": 8}, {}, 8),
        ("optimize", {"queries": ["a cat"] * 16, "n": 8}, {}, 128),
        ("optimize", {"queries": ["a cat", "a dog"], "n": 2}, BEST, 8),
        ("optimize", {"query": "a cat", "n": 6}, BEST, 6),
        ("optimize", {"query": "a cat", "n": 8, "temperature": 0}, {}, 1),
        ("chat", CHAT, {}, 1),
        ("chat", {**CHAT, "n": 5}, {}, 5),
        ("chat", {**CHAT, "n": 5, "temperature": 0}, {}, 1),
        ("chat", CHAT, BEST, 4),
        ("make_video", {"query": "a cat"}, {"videos": {"store": "/tmp/none"}}, 1),
        ("make_video", {"query": "a cat"}, {"videos": {"store": "/tmp/none"}, **BEST}, 4),
        ("make_video", {"query": "a cat", "prompt": "A cat."}, {"videos": {"store": "/tmp/none"}, **BEST}, 1),
    ],
)
def test_a_request_costs_the_prompts_that_are_written_for_it(
    route: str, body: dict[str, Any], settings: dict[str, Any], expected: int
) -> None:
    assert cost(route, body, **settings) == expected
