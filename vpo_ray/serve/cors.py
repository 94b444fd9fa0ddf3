"""Which pages of other sites may call the endpoint from a browser: those of `serve.cors_origins`.

A browser asks first which headers it may send. Clients send what their authors like (OpenAI's
`X-Stainless-*`, `OpenAI-Beta`, `traceparent`, a proxy's own), so that a page that is admitted may send
what it asks for: whoever may call is decided by the key, never by a header that a browser adds itself.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from vpo_ray.recipe.serve import normal_origin

METHODS = ("GET", "POST")
# Headers of an answer that a page's script may read.
EXPOSED = (
    "Retry-After",
    "X-Request-ID",
    "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining-Requests",
    "X-RateLimit-Reset-Requests",
)
_ECHOED = "Access-Control-Allow-Headers"
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
MAX_NAMES = 128


class Cors:
    """Answers browsers of the recipe's origins; without any, those of other sites get none.

    The origins are known when the replica starts, after the application was made.
    """

    origins: ClassVar[list[str]] = []

    def __init__(self, app: Any) -> None:
        self.app = app
        self.cors: CORSMiddleware | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.origins:
            return await self.app(scope, receive, send)
        self.cors = self.cors or _Echoing(self.app, self.origins)
        await self.cors(scope, receive, send)


class _Echoing(CORSMiddleware):
    """Starlette's answers, in which an admitted origin is allowed the headers that it asks for."""

    def __init__(self, app: Any, origins: list[str]) -> None:
        known = [normal_origin(origin) for origin in origins]
        patterns = [origin for origin in known if "*" in origin and origin != "*"]
        super().__init__(
            app,
            allow_origins=[origin for origin in known if origin not in patterns],
            allow_origin_regex="|".join(map(_pattern, patterns)) or None,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=EXPOSED,
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        asked = ",".join(request_headers.getlist("access-control-request-headers")).split(",")
        names = [name.strip() for name in asked[:MAX_NAMES] if _NAME.fullmatch(name.strip())]
        if _ECHOED in response.headers:
            del response.headers[_ECHOED]
        if names and self.is_allowed_origin(request_headers["origin"]):
            response.headers[_ECHOED] = ", ".join(names)
        return response


def _pattern(origin: str) -> str:
    """`https://*.example.com`: a star stands for labels of a host, or for a port, and nothing else."""
    return "[a-z0-9.-]+".join(map(re.escape, origin.split("*")))
