"""The HTTP application around the routes: errors in OpenAI's form, a limit on the body, event streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from vpo_ray.recipe import Serve
from vpo_ray.serve.cors import Cors
from vpo_ray.serve.errors import ApiError

logger = logging.getLogger("ray.serve")

LARGE_BODY = 2**18

T = TypeVar("T")


def refused(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def application() -> FastAPI:
    """An application without routes, for `serve.ingress`."""
    http = FastAPI(title="vpo_ray", docs_url=None, redoc_url=None)
    http.add_middleware(Cors)

    @http.exception_handler(ApiError)
    async def _refused(request: Request, error: ApiError) -> JSONResponse:
        return refused(error)

    @http.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return refused(ApiError(error.status_code, message, headers=error.headers))

    @http.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        return internal(error)

    return http


def internal(error: Exception) -> JSONResponse:
    """An error 500, without internals, for the client. The log gets the kind and place of the error, but not
    its message, which may quote the query."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "nowhere"
    logger.error("a request failed: %s at %s", type(error).__name__, place)
    return refused(ApiError(500, "the endpoint failed; try again"))


async def read_body(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError (413) as soon as it exceeds the limit, in bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


async def parsed(parse: Callable[[bytes, Serve], T], body: bytes, settings: Serve) -> T:
    """A body as `parse` reads it. A large one, which has an image, is read beside the event loop."""
    if len(body) <= LARGE_BODY:
        return parse(body, settings)
    return await asyncio.to_thread(parse, body, settings)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is over {limit} bytes", code="body_too_large")


class Events(StreamingResponse):
    """Server-sent events; `done` is called however the answer ends, also when the client disconnects.

    Args:
        events: closed at the end, and so is `source`, from which they are made (a generator that never
            started closes nothing).
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        done: Callable[[], None] | None = None,
        source: AsyncIterator[str] | None = None,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.done, self._closed_at_end = done, [events, *([source] if source is not None else [])]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.done is not None:
                self.done()
            for events in self._closed_at_end:
                if (close := getattr(events, "aclose", None)) is not None:
                    await close()
