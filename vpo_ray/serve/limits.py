"""Limits of a caller: prompts a minute as a token bucket, and prompts at once.

The unit is a prompt that the policy writes: a request counts as queries x candidates. Each ingress replica
counts for itself and admits its share of a key's limits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.keys import Key

# A route calls it once it knows how many prompts, or videos, its request asks for.
Take = Callable[[int], None]
# Allowed rounding of the clock, so that a client that retries after `Retry-After` is admitted.
ROUNDING_S = 1e-6


@dataclass
class _Caller:
    tokens: float
    filled: float
    running: int = 0


class CallerLimits:
    """Limits per caller, by the name of the key.

    Args:
        requests_per_minute, concurrency: defaults of a key, in prompts; None is no limit.
        share: replicas that split the limits between them.
        now: a clock in seconds.
        least: prompts of the smallest possible request (best of n). A caller with nothing running and a
            full bucket may always ask for that many, however small its limits.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        concurrency: int | None,
        share: int = 1,
        now: Callable[[], float] = time.monotonic,
        least: int = 1,
    ) -> None:
        self.requests_per_minute, self.concurrency, self.share = requests_per_minute, concurrency, share
        self._now, self.least = now, least
        self._callers: dict[str, _Caller] = {}

    @contextmanager
    def admit(self, key: Key) -> Iterator[Admission]:
        """Hold one of the caller's places, before the size of the request is known.

        Raises:
            ApiError: 429 with `Retry-After` when all are taken.
        """
        admission = Admission(self, key)
        try:
            yield admission
        finally:
            admission.caller.running -= admission.held

    def part(self, limit: int | None) -> int | None:
        """A replica's share of a limit."""
        return None if limit is None else math.ceil(limit / self.share)

    def caller(self, key: Key, rate: int | None) -> _Caller:
        """The caller, with its bucket filled up to now."""
        now = self._now()
        caller = self._callers.setdefault(key.name, _Caller(rate or 0, now))
        if rate is not None:
            caller.tokens = min(rate, caller.tokens + (now - caller.filled) * rate / 60)
        caller.filled = now
        return caller


class Admission:
    """An admitted request: it holds one place, and more once its size is known."""

    def __init__(self, limits: CallerLimits, key: Key) -> None:
        self._limits, self._key, self.held, self.taken = limits, key, 0, False
        self.rate, self.places = (
            key.requests_per_minute or limits.requests_per_minute,
            key.concurrency or limits.concurrency,
        )
        self.caller = limits.caller(key, limits.part(self.rate))
        self._hold(1)

    def take(self, work: int) -> None:
        """Charge the request for its prompts. A burst may use a whole minute's at once; a request larger than
        the replica's share is admitted, on credit, once the bucket is full.

        Raises:
            ApiError: 429 with `Retry-After`, after which the bucket is full enough for this request; 413
                when it asks for more than the whole limit.
        """
        for limit, span in ((self.rate, "a minute"), (self.places, "at once")):
            if limit is not None and work > max(limit, self._limits.least):
                raise ApiError(
                    413,
                    f"this request asks for {work} prompts (queries x candidates), and this key may have "
                    f"{limit} {span}: send fewer queries, or a smaller n or budget",
                    code="request_too_large",
                )
        rate = self._limits.part(self.rate)
        if rate is not None:
            self._limits.caller(self._key, rate)
            seconds = (min(work, rate) - self.caller.tokens) * 60 / rate
            if seconds > ROUNDING_S:
                wait = math.ceil(seconds - ROUNDING_S / 2)
                raise _refusal(f"over {rate} prompts a minute of this key, {work} asked for", wait)
        self._hold(work - self.held)
        self.taken = True
        if rate is not None:
            self.caller.tokens -= work

    def charge_invalid(self) -> None:
        """Charge an invalid request for one prompt, so that these are limited too."""
        if not self.taken and self.rate is not None:
            self.caller.tokens = max(self.caller.tokens - 1, min(self.caller.tokens, 0))

    def _hold(self, more: int) -> None:
        """Raises ApiError (429) unless the caller may run `more` prompts, or runs nothing else."""
        places, others = self._limits.part(self.places), self.caller.running - self.held
        if places is not None and others and others + self.held + more > places:
            raise _refusal(f"{others} prompts of this key are being written, at most {places} are allowed", 1)
        self.caller.running += more
        self.held += more


def _refusal(message: str, wait_s: int) -> ApiError:
    return ApiError(
        429,
        f"{message}; try again in {wait_s} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )
