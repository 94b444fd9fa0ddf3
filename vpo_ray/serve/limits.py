"""Limits of a caller: requests a minute as a token bucket, and requests at once.

Each ingress replica counts by itself and admits its share of a key's limits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vpo_ray.serve.errors import RequestError
from vpo_ray.serve.keys import Key


@dataclass
class _Caller:
    tokens: float
    filled: float
    running: int = 0


class Limits:
    """Counts callers by name.

    Args:
        requests_per_minute, concurrency: of a key without own ones; None is no limit.
        share: replicas that split the limits between them.
        now: a clock in seconds.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        concurrency: int | None,
        share: int = 1,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requests_per_minute, self.concurrency, self.share = requests_per_minute, concurrency, share
        self._now = now
        self._callers: dict[str, _Caller] = {}

    @contextmanager
    def admit(self, key: Key) -> Iterator[None]:
        """Hold one of the caller's places. A burst may take a whole minute's requests at once.

        Raises:
            RequestError: 429 with `Retry-After`.
        """
        rate = self._part(key.requests_per_minute or self.requests_per_minute)
        places = self._part(key.concurrency or self.concurrency)
        now = self._now()
        caller = self._callers.setdefault(key.name, _Caller(rate or 0, now))
        if places is not None and caller.running >= places:
            raise _refusal(f"{caller.running} requests of this key are running, {places} may", 1)
        if rate is not None:
            caller.tokens = min(rate, caller.tokens + (now - caller.filled) * rate / 60)
            caller.filled = now
            if caller.tokens < 1:
                wait = math.ceil((1 - caller.tokens) * 60 / rate)
                raise _refusal(f"over {rate} requests a minute of this key", wait)
            caller.tokens -= 1
        caller.running += 1
        try:
            yield
        finally:
            caller.running -= 1

    def _part(self, limit: int | None) -> int | None:
        return None if limit is None else math.ceil(limit / self.share)


def _refusal(message: str, wait_s: int) -> RequestError:
    return RequestError(
        429,
        f"{message}; try again in {wait_s} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )
