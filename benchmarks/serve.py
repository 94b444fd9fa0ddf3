"""The endpoint against vLLM's own OpenAI server: same machine, same tiny policy, same requests.

    python benchmarks/serve.py
    python benchmarks/serve.py --requests 200 --memory 1000

In turn: throughput and latency of both at 16 and 64 concurrent clients (throughput >= 0.9, p50 <=
1.15, p99 <= 1.3 of vLLM's); a replica of two killed with SIGKILL under load (no request may fail);
500 malformed, oversized and unauthorised requests mixed into the load (4xx within 100 ms at p99, and
none may reach the engine); and the memory of every process over 20,000 requests.

Answers are not streamed and greedy, so that both servers generate the same tokens. The clients run
in this process, on the same cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import ray

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Serve, load
from vpo_ray.serve.keys import make_key
from vpo_ray.serve.run import free_port, serving
from vpo_ray.world.tiny import make_policy

TINY = Path(__file__).parents[1] / "jobs/recipes/tiny.yaml"
CLIENTS = (16, 64)
WARM_UP = 64
HOST = "127.0.0.1"

log = logging.getLogger("serve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--memory", type=int, default=20_000, help="requests of the memory test")
    parser.add_argument("--bad", type=int, default=500, help="malformed requests")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer; a prompt has about 130")
    arguments = parser.parse_args()
    # Ray gives the root logger a handler of its own.
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    # Ray starts its workers at niceness 15: beside the clients, which run on the same cores here, they
    # would wait where vLLM's server does not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own spelling
    with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as folder:
        checkpoint = make_checkpoint(Path(folder) / "policy")
        key, line = make_key("benchmark")
        (Path(folder) / "keys").write_text(line, "utf-8")
        settings = load(TINY, [f"serve.max_tokens={arguments.tokens}", "serve.port=0"]).serve
        settings = settings.model_copy(update={"keys": f"{folder}/keys"})
        with vllm_server(checkpoint, settings) as url:
            theirs = {n: run(measure(url, key, n, arguments)) for n in CLIENTS}
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/r"
        )
        with serving(checkpoint, settings) as url:
            ours = {n: run(measure(url, key, n, arguments)) for n in CLIENTS}
            bad = run(malformed(url, key, arguments))
            memory = run(flat(url, key, arguments))
        pool = settings.pool.model_copy(update={"size": (2, 2)})
        with serving(checkpoint, settings.model_copy(update={"pool": pool})) as url:
            killed = run(survive(url, key, arguments))
        ray.shutdown()
    result = {"clients": {n: compared(ours[n], theirs[n]) for n in CLIENTS}}
    print(json.dumps({**result, "killed": killed, "malformed": bad, "memory": memory}))  # noqa: T201


def make_checkpoint(folder: Path) -> str:
    make_policy(folder)
    load_tokenizer(str(folder), read_prompt("builtin:policy")).save_pretrained(folder)
    return str(folder)


@contextmanager
def vllm_server(checkpoint: str, settings: Serve) -> Iterator[str]:
    """vLLM's own server with the engine settings of the recipe."""
    port, engine = free_port(HOST), settings.engine
    options = {
        "--model": checkpoint, "--served-model-name": settings.model_name, "--host": HOST, "--port": port,
        "--dtype": engine.dtype, "--max-model-len": engine.max_model_len,
        "--max-num-seqs": engine.max_num_seqs, "--generation-config": "vllm",
        "--chat-template-content-format": "string",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    for name, value in engine.engine_kwargs.items():
        option = name.replace("_", "-")
        words += [f"--{option}"] if value is True else [f"--no-{option}"] if value is False else []
        words += [f"--{option}", str(value)] if not isinstance(value, bool) else []
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    server = subprocess.Popen(
        command, env={**os.environ, **engine.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run(ready(f"http://{HOST}:{port}/health", server))
        yield f"http://{HOST}:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


async def ready(url: str, server: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"vLLM's server ended with {server.returncode}")
            try:
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError("vLLM's server did not come up")


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(work)  # type: ignore[arg-type]


def session(key: str, clients: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=clients),
        headers={"Authorization": f"Bearer {key}"},
        timeout=aiohttp.ClientTimeout(total=300),
    )


def body(number: int, tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": f"query {number}: a cat on a roof in the evening light"}
    return {"model": "vpo", "messages": [message], "temperature": 0, "max_tokens": tokens}


class Calls:
    """What a load of requests came to: seconds and tokens of good ones, statuses of all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ended: list[float] = []
        self.statuses: dict[int, int] = {}
        self.tokens = 0

    async def chat(self, http: aiohttp.ClientSession, url: str, number: int, tokens: int) -> None:
        began = time.perf_counter()
        try:
            async with http.post(f"{url}/chat/completions", json=body(number, tokens)) as reply:
                status, found = reply.status, await reply.json()
        except (aiohttp.ClientError, TimeoutError):
            status, found = 0, {}
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.seconds.append(time.perf_counter() - began)
            self.ended.append(time.monotonic())
            self.tokens += found["usage"]["completion_tokens"]


async def closed_loop(clients: int, count: int, call: Callable[[int], Awaitable[None]]) -> float:
    """`clients` callers that ask one after another until `count` are answered; seconds."""
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await call(number)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(clients)))
    return time.perf_counter() - began


async def measure(url: str, key: str, clients: int, arguments: Any) -> dict[str, float]:
    calls = Calls()
    async with session(key, clients) as http:
        warm = Calls()
        await closed_loop(clients, WARM_UP, lambda n: warm.chat(http, url, -n - 1, arguments.tokens))
        wall = await closed_loop(
            clients, arguments.requests, lambda n: calls.chat(http, url, n, arguments.tokens)
        )
    assert set(calls.statuses) == {200}, calls.statuses
    p50, p99 = np.percentile(calls.seconds, [50, 99])
    found = {"per_s": len(calls.seconds) / wall, "p50": p50, "p99": p99, "tokens": calls.tokens}
    log.info("%s clients at %s: %s", clients, url, {k: round(float(v), 3) for k, v in found.items()})
    return found


def compared(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    ratios = {name: ours[name] / theirs[name] for name in ("per_s", "p50", "p99", "tokens")}
    seconds = {f"our_{name}": ours[name] for name in ("per_s", "p50", "p99")}
    return {name: round(float(value), 3) for name, value in {**ratios, **seconds}.items()}


def replicas() -> list[int]:
    """Process ids of the engine's replicas, oldest first."""
    processes = psutil.Process(os.getpid()).children(recursive=True)
    found = [p for p in processes if "ServeReplica:vpo:PolicyServer" in " ".join(p.cmdline())]
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]


async def survive(url: str, key: str, arguments: Any) -> dict[str, Any]:
    """Kill one of two replicas once a third of the requests is answered."""
    calls, clients, told = Calls(), CLIENTS[-1], {}

    def kill() -> None:
        from ray import serve

        while len(calls.seconds) < arguments.requests // 3:
            time.sleep(0.05)
        before, told["killed_at"] = replicas(), time.monotonic()
        os.kill(before[0], signal.SIGKILL)
        log.info("killed replica %d of %s", before[0], before)
        while True:
            time.sleep(0.5)
            deployment = serve.status().applications["vpo"].deployments["PolicyServer:vpo"]
            if deployment.replica_states.get("RUNNING", 0) == 2 and set(replicas()) - set(before):
                break
        told["recovered_s"] = time.monotonic() - told["killed_at"]

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    async with session(key, clients) as http:
        wall = await closed_loop(
            clients, arguments.requests, lambda n: calls.chat(http, url, n, arguments.tokens)
        )
    await asyncio.to_thread(thread.join, 300)
    failed = sum(count for status, count in calls.statuses.items() if status != 200)
    # The longest time without any answer: what callers saw of the death.
    gaps = np.diff([told["killed_at"], *sorted(t for t in calls.ended if t > told["killed_at"])])
    return {
        "requests": arguments.requests,
        "failed": failed,
        "recovered_s": round(told.get("recovered_s", -1), 1),
        "longest_gap_s": round(float(gaps.max()), 2),
        "per_s": round(len(calls.seconds) / wall, 2),
    }


async def malformed(url: str, key: str, arguments: Any) -> dict[str, Any]:
    """Bad requests among good ones: how fast they are refused, and what the engine's log shows."""
    long = json.dumps(body(0, 8) | {"messages": [{"role": "user", "content": "x" * 2**20}]}).encode()
    many = json.dumps(body(0, 8) | {"messages": [{"role": "user", "content": "x"}] * 10_000}).encode()
    good = json.dumps(body(0, 8)).encode()
    kinds: list[tuple[bytes, str]] = [
        (b"not json", key), (b"\xff\xfe", key), (b"{}", key), (long, key), (many, key), (good, "vpo-wrong"),
        (json.dumps(body(0, 8) | {"n": 1000}).encode(), key), (b"[" * 50_000, key),
        (json.dumps(body(0, 8) | {"n": 0}).encode(), key),
        (json.dumps(body(0, 8) | {"model": "gpt-4"}).encode(), key),
    ]  # fmt: skip
    calls, seconds, statuses = Calls(), [], {}
    before = engine_calls()
    async with session(key, CLIENTS[0] + 4) as http:

        async def bad(number: int) -> None:
            raw, used = kinds[number % len(kinds)]
            began = time.perf_counter()
            headers = {"Authorization": f"Bearer {used}", "Content-Type": "application/json"}
            async with http.post(f"{url}/chat/completions", data=raw, headers=headers) as reply:
                await reply.read()
            seconds.append(time.perf_counter() - began)
            statuses[reply.status] = statuses.get(reply.status, 0) + 1
            await asyncio.sleep(0.02)  # mixed in, not a flood

        await asyncio.gather(
            closed_loop(
                CLIENTS[0], arguments.requests // 2, lambda n: calls.chat(http, url, n, arguments.tokens)
            ),
            closed_loop(2, arguments.bad, bad),
        )
    await asyncio.sleep(1)
    return {
        "requests": len(seconds),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "p50_ms": round(float(np.percentile(seconds, 50)) * 1000, 1),
        "p99_ms": round(float(np.percentile(seconds, 99)) * 1000, 1),
        "reached_engine": engine_calls() - before - sum(calls.statuses.values()),
    }


def engine_calls() -> int:
    """Calls that the engine's replicas logged, the probes of its health left out."""
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    texts = [file.read_text("utf-8", "replace") for file in folder.glob("replica*PolicyServer*")]
    return sum(text.count("CALL answer ") + text.count("CALL stream ") for text in texts)


async def flat(url: str, key: str, arguments: Any) -> dict[str, Any]:
    """Resident memory of the proxy, the ingress and the engine: after a tenth of the requests, which
    fill caches and pools, and at the end."""
    count, calls = arguments.memory, Calls()
    async with session(key, CLIENTS[0]) as http:

        async def load_of(first: int, last: int) -> None:
            await closed_loop(CLIENTS[0], last - first, lambda n: calls.chat(http, url, first + n, 4))

        await load_of(0, count // 10)
        before = memory()
        await load_of(count // 10, count)
    after = memory()
    grown = {name: round(after[name] - before[name], 1) for name in before}
    assert set(calls.statuses) == {200}, calls.statuses
    return {"requests": count, "mb": {k: round(v) for k, v in after.items()}, "grown_mb": grown}


def memory() -> dict[str, float]:
    """Megabytes of each of our processes by what it is."""
    found: dict[str, float] = {}
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            name, size = " ".join(process.cmdline())[:80], process.memory_info().rss / 1e6
        except psutil.Error:
            continue
        for kind in ("PolicyServer", "Ingress", "ProxyActor", "ServeController", "EngineCore"):
            if kind in name:
                found[kind] = found.get(kind, 0) + size
    return found


if __name__ == "__main__":
    main()
