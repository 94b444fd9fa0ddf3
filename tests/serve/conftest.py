"""Fixtures of the endpoint's tests: services that the ingress asks, and one engine for all of them."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import Reply, Server
from tiny_endpoint import SETTINGS

from vpo_ray.recipe import Serve

# Workers have the environment that their cluster starts with.
os.environ.setdefault("VPO_FEEDBACK_SECRET", "a secret of the tests")


@pytest.fixture(scope="session")
def outside() -> Iterator[Callable[[Callable[[str, dict[str, Any]], Reply]], Server]]:
    """Starts a `Server`; all end with the session."""
    servers: list[Server] = []

    def start(reply: Callable[[str, dict[str, Any]], Reply]) -> Server:
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def checkpoint(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny policy as training leaves it: with the task prompt in its chat template."""
    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import read_prompt

    folder = tmp_path_factory.mktemp("checkpoint")
    for file in (tiny_models / "policy").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_tokenizer(str(folder), read_prompt("builtin:policy")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="package")
def url(ray_cluster: None, checkpoint: str) -> Iterator[str]:
    """The endpoint on the tiny policy, open to all."""
    from vpo_ray.serve.run import serving

    with serving(checkpoint, SETTINGS) as url:
        yield url


# Applications of `endpoint` in this module.
_started: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _end_what_a_module_started() -> Iterator[None]:
    """The session's cluster has four CPUs, which video models of the endpoint would keep from other tests."""
    _started.clear()
    yield
    if _started:
        from ray import serve

        for name in _started:
            serve.delete(name, _blocking=False)


@pytest.fixture(scope="package")
def endpoint(url: str, checkpoint: str) -> Callable[..., str]:
    """Puts another ingress, with other settings, in front of the same engine: the URL of its `/v1`. It ends
    with the module, unless it is `lasting`."""
    from ray import serve

    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import control_tokens
    from vpo_ray.serve.app import ingress_app

    control = control_tokens(load_tokenizer(checkpoint))

    def start(name: str, lasting: bool = False, **settings: Any) -> str:
        engine = serve.get_deployment_handle("PolicyServer:vpo", "vpo")
        chosen = Serve.model_validate({**SETTINGS.model_dump(), "max_tokens": 20, **settings})
        serve.run(
            ingress_app(engine, engine if chosen.canary else None, chosen, control),
            name=name,
            route_prefix=f"/{name}",
        )
        if not lasting:
            _started.append(name)
        where = url.replace("/v1", f"/{name}/v1")
        assert httpx.get(where.replace("/v1", "/health")).status_code == 200
        return where

    return start


@pytest.fixture(scope="package")
def brief(endpoint: Callable[..., str]) -> str:
    """An ingress whose answers are short, and which the pages of one other site may call. The canary
    that takes half of the queries is the same engine."""
    canary = {"checkpoint": "the same", "share": 0.5}
    return endpoint("brief", True, max_tokens=12, cors_origins=["https://studio.example"], canary=canary)
