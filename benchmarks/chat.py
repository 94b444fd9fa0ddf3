"""How much of an endpoint's speed the chat engine takes: `python benchmarks/chat.py`.

A server of its own process answers every request 200 ms after it came. With 64 in flight it could
answer 320 a second; what the engine gets of that, with every answer kept on disk, is the share. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from typing import Any

from ray._private.async_compat import get_new_event_loop

from vpo_ray.engines.chat import Sampling
from vpo_ray.engines.chat.openai_chat import Account, Answers, OpenAIChat
from vpo_ray.engines.endpoint.client import EndpointClient
from vpo_ray.recipe import ChatModel, Endpoint

ANSWER = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "A quiet scene by the sea. " * 20},
            }
        ],
        "usage": {"prompt_tokens": 500, "completion_tokens": 120, "total_tokens": 620},
    }
).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3200)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the server takes")
    parser.add_argument(
        "--answers", metavar="DIR", help="where answers are kept (the system's temporary folder)"
    )
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs, options.latency), daemon=True)
    server.start()
    try:
        # The event loop that Ray gives its actors.
        with asyncio.Runner(loop_factory=get_new_event_loop) as runner:
            found = runner.run(_measure(ours.recv(), options))
    finally:
        server.terminate()
        server.join()
    sys.stdout.write(json.dumps(found) + "\n")


async def _measure(port: int, options: argparse.Namespace) -> dict[str, Any]:
    endpoint = Endpoint(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key_env=None,
        concurrency=options.in_flight,
        prompt_price=1,
    )
    model = ChatModel(model="m", backend="openai", endpoint=endpoint)
    spent = [0.0]

    async def add(cost: float) -> float:
        spent[0] += cost
        return spent[0]

    sampling = Sampling(temperature=0.7, max_tokens=200, seed=1)
    with tempfile.TemporaryDirectory(dir=options.answers) as folder:
        async with EndpointClient(endpoint, "m", "endpoint") as client:
            chat = OpenAIChat(model, client, Answers(folder, "benchmark"), Account(add))

            async def ask(number: int) -> None:
                question = f"Request {number}. " + "What does the prompt lack? " * 60
                await chat.complete([{"role": "user", "content": question}], sampling)

            # Connections and imports first.
            await asyncio.gather(*(ask(-1 - number) for number in range(options.in_flight)))
            began, processor = time.perf_counter(), time.process_time()
            numbers = iter(range(options.requests))

            async def work() -> None:
                for number in numbers:
                    await ask(number)

            # As in the pool: rows for every slot of the endpoint, and as many that wait for one.
            await asyncio.gather(*(work() for _ in range(2 * options.in_flight)))
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
    ideal = options.in_flight / options.latency
    rate = options.requests / seconds
    return {
        "benchmark": "chat",
        "requests": options.requests,
        "in_flight": options.in_flight,
        "latency_s": options.latency,
        "requests_per_s": round(rate, 1),
        "ideal_per_s": round(ideal, 1),
        "share_of_ideal": round(rate / ideal, 4),
        "cpu_ms_per_request": round(1000 * processor / options.requests, 2),
    }


def _serve(pipe: Any, latency: float) -> None:
    asyncio.run(_answer_all(pipe, latency))


async def _answer_all(pipe: Any, latency: float) -> None:
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(ANSWER)}\r\nConnection: keep-alive\r\n\r\n"
    ).encode()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                writer.write(head + ANSWER)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    main()
