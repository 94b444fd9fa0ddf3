"""The budget of requests and tokens a minute that all clients of an endpoint share."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from vpo_ray.engines.endpoint.failures import LOOKED_AT, RequestError


class RateLimiter:
    """Spaces requests so that no minute exceeds the limits of requests and tokens.

    Requests are spread evenly, without a burst at the start of a minute or after this object was lost with
    its process. Callers pass the limits, so that two runs may share one object.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._request_at = self._tokens_at = 0.0

    def reserve(self, tokens: int, per_minute: tuple[int | None, int | None]) -> float:
        """Seconds to wait before a request of so many tokens is sent.

        Args:
            tokens: an estimate of prompt and completion tokens; see `refund`.
            per_minute: limits of requests and of tokens; None is no limit.
        """
        now = self._now()
        request_at, tokens_at = max(now, self._request_at), max(now, self._tokens_at)
        requests_limit, tokens_limit = per_minute
        self._request_at = request_at + (60 / requests_limit if requests_limit else 0)
        if tokens_limit:
            self._tokens_at = tokens_at + 60 * tokens / tokens_limit
        return max(request_at, tokens_at) - now

    def refund(self, unused: int, tokens_per_minute: int) -> None:
        """Return reserved tokens that were not used (negative: reserve more)."""
        self._tokens_at -= 60 * unused / tokens_per_minute

    def pause(self, seconds: float) -> None:
        """Hold all requests for so many seconds, as the server asked."""
        self._request_at = max(self._request_at, self._now() + seconds)


class ClusterRateLimiter:
    """One `RateLimiter` for the whole cluster: a named Ray actor, made by the first caller."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    async def call(self, method: str, *arguments: Any) -> Any:
        import ray

        for _ in range(5):
            # It dies with the process that made it; the next caller makes a new one.
            if self._actor is None:
                options = {"name": self._name, "namespace": "vpo_ray", "get_if_exists": True, "num_cpus": 0}
                self._actor = await asyncio.to_thread(ray.remote(RateLimiter).options(**options).remote)
            try:
                return await getattr(self._actor, method).remote(*arguments)
            except ray.exceptions.RayActorError:
                self._actor = None
        raise RequestError("the cluster's rate limiter is not available: its actor died five times")


class LocalRateLimiter:
    """A rate limiter of this process only."""

    def __init__(self) -> None:
        self._limiter = RateLimiter()

    async def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._limiter, method)(*arguments)


# Gemini's `retryDelay`, and what OpenAI and others write: "try again in 1m2.5s", "retry after 20 seconds".
_TOLD = re.compile(
    r"""(?:retry_?delay\W{1,6} | (?:try\ again|retry)\ (?:in|after)\ )
        (?:(?P<minutes>\d{1,4})\ ?m(?:in(?:ute)?s?)?\b\ ?|(?P<m>\d{1,4})m(?!s))?
        (?:(?P<number>\d{1,6}(?:\.\d{1,9})?)\ ?(?P<unit>ms|milliseconds|s(?:ec(?:ond)?s?)?)\b)?""",
    re.VERBOSE | re.IGNORECASE,
)


def retry_after(headers: Any, text: str = "") -> float | None:
    """Seconds that a server asks to wait, from `retry-after-ms` or `Retry-After` (seconds or a date), or else
    from what it says.

    Args:
        text: of the error.
    """
    found = _of_headers(headers)
    return _of_text(text) if found is None else found


def _of_text(text: str) -> float | None:
    told = _TOLD.search(text[:LOOKED_AT])
    minutes, number = (told["minutes"] or told["m"], told["number"]) if told is not None else (None, None)
    if told is None or (minutes is None and number is None):
        return None
    unit = 1000 if (told["unit"] or "").lower().startswith("m") else 1
    return 60.0 * int(minutes or 0) + float(number or 0) / unit


def _of_headers(headers: Any) -> float | None:
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if seconds >= 0:  # not NaN
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None
