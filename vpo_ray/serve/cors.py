"""Cross-origin requests: pages of the sites in `serve.cors_origins` may call the endpoint from a browser.

A browser asks first which headers it may send. Clients add all kinds (OpenAI's `X-Stainless-*`,
`OpenAI-Beta`, `traceparent`, a proxy's own), so an admitted page may send any. Access is decided by the key,
never by a header that a browser adds itself.
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
    """CORS headers for the recipe's origins; none for other sites.

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
    """Starlette's middleware, but an admitted origin may send the headers that it asks for."""

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
    """In `https://*.example.com` a star matches labels of a host, or a port, and nothing else."""
    return "[a-z0-9.-]+".join(map(re.escape, origin.split("*")))
