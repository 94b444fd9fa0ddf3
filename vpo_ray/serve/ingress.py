"""The HTTP side of the endpoint: OpenAI's routes, in front of the engine's deployment.

It refuses what is malformed before the engine sees it, breaks up control tokens in the query, and
hands the engine one user message: the checkpoint's chat template puts it into the task prompt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from vpo_ray.policy_prompt import neutralise
from vpo_ray.recipe import Serve
from vpo_ray.serve.request import ChatRequest, RequestError, max_body_bytes, parse_request

logger = logging.getLogger("ray.serve")
http = FastAPI(title="vpo_ray", docs_url=None, redoc_url=None)

# Without a replica that can take it a call waits for one: whoever asks for health is told sooner.
HEALTH_SECONDS = 5

_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
    }
}


@http.exception_handler(RequestError)
async def _refused(request: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


@http.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, message).body(), error.status_code)


@http.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> JSONResponse:
    """What went wrong goes to the log; a client learns that it was not its fault, and no internals."""
    logger.error("a request failed", exc_info=error)
    return JSONResponse(RequestError(500, "the engine failed; try again").body(), 500)


# `serve.ingress` copies the routes when the class is made: what they call is defined before it.
async def _read(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit. Raises RequestError (413)."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise RequestError(413, f"the body is over {limit} bytes", code="body_too_large")
    return bytes(body)


async def _chained(first: str, rest: AsyncIterator[str | dict[str, Any]]) -> AsyncIterator[str]:
    yield first
    async for part in rest:
        yield part if isinstance(part, str) else f"data: {json.dumps({'error': part})}\n\n"


@serve.ingress(http)
class Ingress:
    """Replica of the HTTP side; light, so that it starts while the engine loads.

    Args:
        engine: handle of the `PolicyServer` deployment.
        control: the checkpoint's control tokens (policy_prompt.control_tokens).
    """

    def __init__(self, engine: DeploymentHandle, settings: Serve, control: tuple[str, ...]) -> None:
        self.engine, self.answers = engine, engine.options(stream=True)
        self.settings, self.control = settings, control
        self.created = int(time.time())

    @http.get("/health")
    async def health(self) -> dict[str, str]:
        """Answers once the engine does."""
        try:
            await asyncio.wait_for(self.engine.check_health.remote(), HEALTH_SECONDS)
        except Exception as error:
            raise RequestError(503, "the engine does not answer", code="engine_unavailable") from error
        return {"status": "ok"}

    @http.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    @http.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        if model != self.settings.model_name:
            raise RequestError(404, f"the model {model[:100]!r} does not exist", "model", "model_not_found")
        return self._card()

    @http.post("/v1/chat/completions", openapi_extra=_BODY)
    async def chat(self, request: Request) -> Response:
        query, fields = parse_request(await _read(request, max_body_bytes(self.settings)), self.settings)
        fields["messages"] = [{"role": "user", "content": neutralise(query, self.control)}]
        answer = aiter(self.answers.chat_json.remote(fields))
        # The first part tells whether the engine took the request, while the status can still be set.
        first = await anext(answer)
        if isinstance(first, dict):
            raise RequestError(first["code"], first["message"], first.get("param"))
        if fields["stream"]:
            return StreamingResponse(_chained(first, answer), media_type="text/event-stream")
        return Response(first, media_type="application/json")

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "vpo_ray",
        }
