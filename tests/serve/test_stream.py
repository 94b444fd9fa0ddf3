"""A stream to a real client over loopback: slow, gone, or of an engine that fails half-way.

Ray Serve's handle is stood in for, so that the engine's pace and failures are the test's."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from ray.exceptions import RayError
from starlette.responses import Response

from vpo_ray.recipe import Serve
from vpo_ray.recipe.serve import Safety
from vpo_ray.serve.http import Events, application
from vpo_ray.serve.metrics import ServeMetrics
from vpo_ray.serve.optimiser import Optimiser
from vpo_ray.serve.optimize_schema import engine_fields
from vpo_ray.serve.policy import PolicyClient, PolicyFailed
from vpo_ray.serve.safety import Gate

TIMEOUT_S = 0.6
PIECE = "x" * 60_000


def chunk(text: str) -> str:
    """A part of an answer, as the engine sends it."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"


class Handle:
    """A handle of the engine's deployment whose answers are what `parts` gives."""

    def __init__(self, parts: Callable[[], AsyncIterator[Any]]) -> None:
        self.parts, self.stream, self.cancelled, self.finished = (
            parts,
            self,
            threading.Event(),
            threading.Event(),
        )

    def options(self, stream: bool) -> "Handle":
        return self

    def remote(self, body: dict[str, Any]) -> "Handle":
        self._answer = self._told()
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._answer

    async def _told(self) -> AsyncIterator[Any]:
        async for part in self.parts():
            yield part
        self.finished.set()

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.fixture
def listening() -> Iterator[Callable[[Handle], tuple[int, threading.Event]]]:
    """Serves an answer of a handle at `/`, and as `/v1/optimize` streams it at `/written`: the port, and
    what is set when the request has given its place back."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(handle: Handle) -> tuple[int, threading.Event]:
        settings = Serve(timeout_s=TIMEOUT_S, retries=0)
        policy = PolicyClient(handle, None, settings, (), ServeMetrics())  # type: ignore[arg-type]
        optimiser = Optimiser(policy, Gate(Safety()), None, settings)
        http: FastAPI = application()
        over = threading.Event()
        fields = engine_fields(settings, 1, None, None)

        @http.get("/")
        async def answer() -> Response:
            parts = await policy.stream("a cat", fields, "1")
            return Events(parts, over.set)

        @http.get("/written")
        async def written() -> Response:
            async def events() -> AsyncIterator[str]:
                try:
                    async for part in optimiser.stream("a cat", fields, "1"):
                        yield f"data: {part if isinstance(part, str) else part.model_dump_json()}\n\n"
                except PolicyFailed as error:
                    yield f"data: failed {error.timeout}\n\n"

            return Events(events(), over.set)

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(http, host="127.0.0.1", port=port, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return port, over

    yield start
    for server, thread in servers:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


def connect(port: int, path: str = "/") -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return client


def read(client: socket.socket) -> str:
    found = bytearray()
    while data := client.recv(65536):
        found += data
    client.close()
    return found.decode()


async def long_answer() -> AsyncIterator[str]:
    """Several megabytes at once: far more than the buffers between server and client hold."""
    for _ in range(120):
        yield chunk(PIECE)
    yield "data: [DONE]\n\n"


@pytest.mark.parametrize("path", ["/", "/written"])
def test_a_client_that_reads_slowly_gets_the_whole_answer(listening: Any, path: str) -> None:
    handle = Handle(long_answer)
    port, over = listening(handle)
    client = connect(port, path)
    assert handle.finished.wait(20), "the engine does not wait for the reader"
    time.sleep(2 * TIMEOUT_S)
    assert not over.is_set(), "the reader is not through"
    text = read(client)
    assert text.count(PIECE) == 120 * (2 if path == "/written" else 1), "in the result once more"
    assert '"error"' not in text
    assert not handle.cancelled.is_set()
    if path == "/":
        assert "data: [DONE]\n\n" in text
    else:
        result = json.loads(text.split("data: ")[-1].split("\n\n")[0])
        assert result["latency"]["optimiser"] < 2 * TIMEOUT_S, "the reading is no part of it"
        assert result["latency"]["total"] < 2 * TIMEOUT_S
    assert over.wait(10)


def failing(how: str) -> Callable[[], AsyncIterator[Any]]:
    async def parts() -> AsyncIterator[Any]:
        yield chunk("a cat")
        if how == "late":
            await asyncio.sleep(60)
        elif how == "died":
            raise RayError("a secret of the user")
        elif how == "broken":
            raise ZeroDivisionError("a secret of the user")
        elif how == "told":
            yield {"code": 500, "message": "a secret of the user"}
            yield "data: [DONE]\n\n"
        elif how == "refused":
            yield {"code": 400, "message": "too long", "param": None}

    return parts


@pytest.mark.parametrize(
    ("how", "code", "kind"),
    [
        ("late", "timeout", "server_error"),
        ("died", "engine_failed", "server_error"),
        ("broken", None, "server_error"),
        ("told", "engine_failed", "server_error"),
        ("refused", None, "invalid_request_error"),
    ],
)
def test_a_stream_that_fails_half_way_ends_with_an_error(
    listening: Any, how: str, code: Any, kind: str
) -> None:
    handle = Handle(failing(how))
    port, over = listening(handle)
    text = read(connect(port))
    assert chunk("a cat") in text
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
    ]
    error = events[-1]["error"]
    assert (error["code"], error["type"]) == (code, kind)
    assert set(error) == {"message", "type", "param", "code"}
    assert "[DONE]" not in text
    assert "secret" not in text
    assert text.endswith("0\r\n\r\n"), "the body ends as it should"
    assert handle.cancelled.wait(10)
    assert over.wait(10)


def test_a_late_answer_of_optimize_is_told_as_late(listening: Any) -> None:
    port, _ = listening(Handle(failing("late")))
    assert "data: failed True" in read(connect(port, "/written"))


@pytest.mark.parametrize("path", ["/", "/written"])
@pytest.mark.parametrize("parts", [failing("late"), long_answer])
def test_a_client_that_leaves_frees_its_place_and_the_engine(
    listening: Any, path: str, parts: Callable[[], AsyncIterator[Any]]
) -> None:
    handle = Handle(parts)
    port, over = listening(handle)
    client = connect(port, path)
    assert client.recv(10)
    client.close()
    assert over.wait(10)
    if parts is not long_answer:  # which the engine has written by then
        assert handle.cancelled.wait(TIMEOUT_S / 2), "it is not left to its time limit"
