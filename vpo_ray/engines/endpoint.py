"""The client of an OpenAI-compatible endpoint, for every engine that asks one (chat, reward).

It adds to the `openai` client what a cluster needs: replicas share a budget of requests and tokens
a minute, a server that says Retry-After is left alone by all of them, and an error says whether it
is the recipe's (`EndpointError`, which stops the run) or one request's (`RequestError`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import aiohttp
import openai

from vpo_ray.engines.account import Account
from vpo_ray.engines.chat import Usage
from vpo_ray.engines.completion import Completion, parse, read
from vpo_ray.recipe import Endpoint
from vpo_ray.records import content_id

logger = logging.getLogger(__name__)

# Wrong settings or an empty account, not a wrong request.
_STOPS = frozenset({401, 402, 403, 404})
_RETRIED = frozenset({408, 409, 425, 429})
# Seconds: the first pause between two tries (doubled each time), the longest, and the longest that
# a server may ask for.
FIRST_DELAY_S, MAX_DELAY_S, MAX_RETRY_AFTER_S = 0.5, 30.0, 600.0


class EndpointError(ValueError):
    """An endpoint that cannot be used with these settings."""

    stops_run = True  # see pools.STOP


class RequestError(RuntimeError):
    """One request that the endpoint did not answer; others may be.

    Attributes:
        status: HTTP status, or None where there was no answer at all.
        filtered: a content filter refused it.
    """

    def __init__(self, message: str, status: int | None = None, filtered: bool = False) -> None:
        super().__init__(message)
        self.status, self.filtered = status, filtered


class Pace:
    """Spaces requests so that a minute has no more of them, and of their tokens, than it may.

    Requests are spread evenly: there is no burst at the start of a minute, nor after this object
    was lost with its process and made again. Whoever calls gives the limits, so that two runs may
    share one object.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._request_at = self._tokens_at = 0.0

    def reserve(self, tokens: int, per_minute: tuple[int | None, int | None]) -> float:
        """Seconds to wait before a request of so many tokens is sent.

        Args:
            tokens: an estimate of what it reads and writes; see `settle`.
            per_minute: how many requests, how many tokens.
        """
        now = self._now()
        request_at, tokens_at = max(now, self._request_at), max(now, self._tokens_at)
        requests_limit, tokens_limit = per_minute
        self._request_at = request_at + (60 / requests_limit if requests_limit else 0)
        if tokens_limit:
            self._tokens_at = tokens_at + 60 * tokens / tokens_limit
        return max(request_at, tokens_at) - now

    def settle(self, unused: int, tokens_per_minute: int) -> None:
        """Give back tokens that were reserved and not used (or, negative, take those that were)."""
        self._tokens_at -= 60 * unused / tokens_per_minute

    def pause(self, seconds: float) -> None:
        """Let no request pass for so long: the server asked for it."""
        self._request_at = max(self._request_at, self._now() + seconds)


class _ClusterPace:
    """One `Pace` for the whole cluster: a named Ray actor, made by whoever comes first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    async def call(self, method: str, *arguments: Any) -> Any:
        import ray

        for _ in range(5):
            # It dies with the process that made it; the next caller makes another.
            if self._actor is None:
                options = {"name": self._name, "namespace": "vpo_ray", "get_if_exists": True, "num_cpus": 0}
                self._actor = await asyncio.to_thread(ray.remote(Pace).options(**options).remote)
            try:
                return await getattr(self._actor, method).remote(*arguments)
            except ray.exceptions.RayActorError:
                self._actor = None
        raise RequestError("the cluster's budget of requests cannot be had: its actor died five times")


class _LocalPace:
    """A pace of this process only, where no budget is shared."""

    def __init__(self) -> None:
        self._pace = Pace()

    async def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._pace, method)(*arguments)


class EndpointClient:
    """Sends chat completions to one model of an endpoint.

    It opens in the first event loop that uses it; where there are several, one after the other, use
    it as an async context manager in each.

    Args:
        endpoint: its settings.
        model: the model's name there.
        where: the recipe's key of these settings, for messages.
        account: what every answer is paid into; its limit keeps requests from being sent.
    """

    def __init__(self, endpoint: Endpoint, model: str, where: str, account: Account | None = None) -> None:
        self.endpoint, self.model, self.where = endpoint, model, where
        self.account = account or Account()
        self._key = ""
        self._reached = False
        self._limits = (endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._pace = self._make_pace()
        self._client: openai.AsyncOpenAI | None = None
        self._numbers: Iterator[int] = count()

    def read_key(self) -> str:
        """The key. Raises EndpointError where its variable is not set."""
        name = self.endpoint.api_key_env
        key = "none" if name is None else os.environ.get(name, "")
        if not key:
            raise EndpointError(f"{self.where}.api_key_env: the variable {name} is not set here")
        return key

    def _make_pace(self) -> _ClusterPace | _LocalPace:
        import ray

        if self._limits == (None, None) or not ray.is_initialized():
            return _LocalPace()
        endpoint = self.endpoint
        account = content_id("endpoint", endpoint.base_url, endpoint.api_key_env, self.model, digits=16)
        return _ClusterPace(f"endpoint-budget-{account}")

    def open(self) -> None:
        """Make the connection pool. Raises EndpointError: no key, or an address that is none."""
        self._key = self.read_key()
        # Ours know of the budget, so the client's own retries are off.
        options: dict[str, Any] = {
            "api_key": self._key,
            "timeout": self.endpoint.timeout_s,
            "max_retries": 0,
            # aiohttp sends a request for half of the CPU time of the client's own transport.
            "http_client": openai.DefaultAioHttpClient(timeout=self.endpoint.timeout_s),
        }
        url, azure = self.endpoint.base_url, self.endpoint.azure_api_version
        try:
            if azure is not None:
                self._client = openai.AsyncAzureOpenAI(azure_endpoint=url or "", api_version=azure, **options)
            else:
                self._client = openai.AsyncOpenAI(base_url=url, **options)
        except (openai.OpenAIError, ValueError) as error:
            raise EndpointError(f"{self.where}: {self._told(error)}") from None
        self._slots = asyncio.Semaphore(self.endpoint.concurrency)
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> EndpointClient:
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def create(self, request: dict[str, Any], tokens: int = 0) -> Completion:
        """One chat completion, paid into the account.

        One that was generated is returned however strange it is, since it was paid for: look at its
        `refusal` and `text`.

        Args:
            request: the body but the model; the recipe's `request` goes on top.
            tokens: an estimate of what it reads and writes, for the budget.

        Raises:
            EndpointError: the key is refused, the model is not known, or there is no such server.
            RequestError: this request has no answer after all retries.
            CostLimitReached: the account may pay no more; nothing was sent.
        """
        if self._client is None:
            self.open()
        merged = {"model": self.model, **request, **self.endpoint.request}
        known = {name: value for name, value in merged.items() if value is not None}
        for tries in range(self.endpoint.retries + 1):
            try:
                return await self._once(known, tokens)
            except _Again as again:
                if tries == self.endpoint.retries:
                    raise again.failure from None
                spread = min(FIRST_DELAY_S * 2**tries, MAX_DELAY_S) * random.uniform(0.5, 1)
                delay = spread if again.after is None else again.after + spread
                logger.info("%s: %s; again in %.1f s", self.where, again.failure, delay)
                await asyncio.sleep(delay)
        raise AssertionError("the loop returns or raises")

    async def _once(self, request: dict[str, Any], tokens: int) -> Completion:
        async with self._slots:
            self.account.check()  # not only after the wait: it may be a long one for nothing
            if wait := await self._pace.call("reserve", tokens, self._limits):
                await asyncio.sleep(wait)
                self.account.check()
            try:
                # The client's own limit is on every read: a server that sends a byte now and then
                # would hold this slot for ever.
                async with asyncio.timeout(self.endpoint.timeout_s):
                    # Answers that come together are worked on together, and the first next request
                    # leaves when the last is built. One at a time, each leaves when it is built.
                    async with self._turn:
                        await asyncio.sleep(0)
                    data = await self._post(request)
            except openai.APIStatusError as error:
                self._reached = True
                raise await self._status_failure(error) from None
            except (openai.APITimeoutError, TimeoutError) as error:
                # The client takes every failure to connect for a timeout.
                if lost := _lost_connection(error):
                    raise _Again(self._unreachable(lost)) from None
                message = f"{self.where}: no answer in {self.endpoint.timeout_s:g} s"
                raise _Again(RequestError(message)) from None
            except openai.APIConnectionError as error:
                raise _Again(self._unreachable(error.__cause__ or error)) from None
            self._reached = True
            try:
                body = parse(data)
            except (openai.OpenAIError, ValueError) as error:
                message = f"{self.where}: the answer is not readable: {self._told(error)}"
                raise _Again(RequestError(message)) from None
            reply = await self._paid(read(body))
        if self._limits[1] and (used := reply.usage.prompt + reply.usage.completion):
            await self._pace.call("settle", tokens - used, self._limits[1])
        if not (reply.answered or reply.refusal or reply.usage.prompt + reply.usage.completion):
            raise _Again(RequestError(f"{self.where}: the answer has no choices"))
        return reply

    async def _paid(self, reply: Completion) -> Completion:
        """The answer with its cost, which is in the account: the one place where money is counted."""
        prompt, completion = reply.usage.prompt, reply.usage.completion
        cost = (prompt * self.endpoint.prompt_price + completion * self.endpoint.completion_price) / 1e6
        # Before another request may take its place.
        await self.account.pay(cost)
        return replace(reply, usage=Usage(prompt, completion, cost))

    async def _post(self, request: dict[str, Any]) -> bytes:
        # `chat.completions.create` walks through the whole request to transform it, and makes a
        # random key for each: a third of all that the client does. A plain dict needs none of that.
        assert self._client is not None
        number = f"{id(self)}-{next(self._numbers)}"
        return await self._client.post(
            "/chat/completions", body=dict(request), cast_to=bytes, options={"idempotency_key": number}
        )

    async def _status_failure(self, error: openai.APIStatusError) -> Exception:
        status, text = error.status_code, self._told(error)
        body = error.body if isinstance(error.body, dict) else {}
        code = body.get("code") or error.code
        # OpenAI answers an empty account with 429, which no waiting mends.
        if status in _STOPS or code == "insufficient_quota":
            return EndpointError(f"{self.where} refuses this: {text}")
        failure = RequestError(f"{self.where}: {text}", status, filtered=code == "content_filter")
        if status not in _RETRIED and status < 500:
            return failure
        after = retry_after(error.response.headers)
        if after is not None:
            if after > MAX_RETRY_AFTER_S:
                return failure
            await self._pace.call("pause", after)
        return _Again(failure, after)

    def _unreachable(self, error: BaseException) -> Exception:
        address = self.endpoint.base_url or "the client's default address"
        message = f"{self.where}: cannot reach {address}: {self._told(error)}"
        # A server that never answered is most likely not there; one that did may be restarting.
        return RequestError(message) if self._reached else EndpointError(message)

    def _told(self, error: BaseException) -> str:
        text = str(error)[:500]
        return text.replace(self._key, "***") if len(self._key) > 4 else text


class _Again(Exception):
    """A try that failed in a way that another may not; `failure` is raised after the last."""

    def __init__(self, failure: Exception, after: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.after = failure, after


def _lost_connection(error: BaseException) -> BaseException | None:
    """The connection's failure that an error comes from, if it is one and no timeout."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, aiohttp.ClientConnectionError) and not isinstance(cause, TimeoutError):
            return cause
        cause = cause.__cause__
    return None


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, from `retry-after-ms` or `Retry-After` (seconds or a date)."""
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
