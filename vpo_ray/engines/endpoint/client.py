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
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

import aiohttp
import openai

from vpo_ray.engines.chat import Usage
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.endpoint.completion import Completion, parse_body, read_completion
from vpo_ray.engines.endpoint.failures import (
    RETRIED,
    STOPS,
    EndpointError,
    RequestError,
    about,
    about_schema,
    may_pass,
    maybe_schema,
)
from vpo_ray.engines.endpoint.rate_limiter import (
    ClusterRateLimiter,
    LocalRateLimiter,
    retry_after,
)
from vpo_ray.prompts.answers import in_words, response_format, schema_fault
from vpo_ray.recipe import Endpoint
from vpo_ray.records import content_id

__all__ = ["EndpointClient", "EndpointError", "RequestError"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds: the first pause between two tries (doubled each time), the longest, and the longest that
# a server may ask for.
FIRST_DELAY_S, MAX_DELAY_S, MAX_RETRY_AFTER_S = 0.5, 30.0, 600.0
# 403s in a row that may be about the key or about their input, before the first is believed.
MAX_FORBIDDEN = 5
# Errors that went on without the JSON schema, before no more are taken for its refusal.
MAX_PROBES = 3


class EndpointClient:
    """Sends chat completions to one model of an endpoint.

    It opens in the event loop that uses it; where there are several, one after the other, use it as an
    async context manager in each, which leaves no connection open.

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
        self._reached = self._answered = False
        self._forbidden = 0  # 403s since the last answer
        # Whether the server takes JSON schemas; None until one was taken or refused.
        self._schemas = None if endpoint.structured == "auto" else endpoint.structured == "json_schema"
        self._probes = self._with_schema = 0
        self._priced = endpoint.prompt_price + endpoint.completion_price > 0
        self._limits = (endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._limiter = self._make_limiter()
        self._client: openai.AsyncOpenAI | None = None
        self._numbers: Iterator[int] = count()

    def read_key(self) -> str:
        """The key. Raises EndpointError where its variable is not set."""
        name = self.endpoint.api_key_env
        key = "none" if name is None else os.environ.get(name, "")
        if not key:
            raise EndpointError(f"{self.where}.api_key_env: the variable {name} is not set here")
        return key

    def _make_limiter(self) -> ClusterRateLimiter | LocalRateLimiter:
        import ray

        if self._limits == (None, None) or not ray.is_initialized():
            return LocalRateLimiter()
        endpoint = self.endpoint
        account = content_id("endpoint", endpoint.base_url, endpoint.api_key_env, self.model, digits=16)
        return ClusterRateLimiter(f"endpoint-budget-{account}")

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
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(self.endpoint.concurrency)
        self._turn = asyncio.Lock()
        self._schema_news = asyncio.Condition()

    async def __aenter__(self) -> EndpointClient:
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def create(
        self, request: dict[str, Any], tokens: int = 0, schema: dict[str, Any] | None = None
    ) -> Completion:
        """One chat completion, paid into the account.

        One that was generated is returned however strange it is, since it was paid for: look at its
        `refusal` and `text`.

        Args:
            request: the body but the model; the recipe's `request` goes on top.
            tokens: an estimate of what it reads and writes, for the budget.
            schema: of the JSON object that the text is to be. With `structured: auto` a server that
                refuses schemas, in whatever words, is told this one in words from then on. The text
                may still be none: see `structured.find_object`.

        Raises:
            EndpointError: the key is refused, the model is not known, or there is no such server.
            RequestError: this request has no answer after all retries.
            CostLimitReached: the account may pay no more; nothing was sent.
        """
        self._opened()
        if schema is None:
            return await self._completed(request, tokens)
        if self._schemas is False:
            return await self._in_words(request, tokens, schema)
        try:
            async with self._asked_with_schema():
                reply = await self._completed({**request, "response_format": response_format(schema)}, tokens)
                self._schemas = True
                return _found(reply, schema)
        except (EndpointError, RequestError) as error:
            if self.endpoint.structured != "auto" or not (about_schema(error) or maybe_schema(error)):
                raise
            refused = error
        return await self._without_schema(request, tokens, schema, refused)

    @asynccontextmanager
    async def _asked_with_schema(self) -> AsyncIterator[None]:
        self._with_schema += 1
        try:
            yield
        finally:
            self._with_schema -= 1
            async with self._schema_news:
                self._schema_news.notify_all()

    async def _without_schema(
        self, request: dict[str, Any], tokens: int, schema: dict[str, Any], refused: Exception
    ) -> Completion:
        """The same in words, where the error may come from the schema; raises it where it does not."""
        assert isinstance(refused, EndpointError | RequestError)
        async with self._schema_news:
            # A request with a schema that is under way may show that they are taken, and one in words
            # that they are not.
            await self._schema_news.wait_for(lambda: self._schemas is not None or not self._with_schema)
            unknown = self._schemas is None
            if self._schemas is not False and not about_schema(refused):
                if self._schemas or self._probes >= MAX_PROBES:
                    raise refused
                self._probes += 1
            self._with_schema += unknown
        try:
            reply = await self._in_words(request, tokens, schema)
            # A server that was out of order may have come back in between: the second time it is believed.
            if self._schemas is None and not (may_pass(refused) and self._probes < 2):
                logger.warning("%s takes no JSON schema (%s): asked in words", self.where, refused.status)
                self._schemas = False
            return reply
        finally:
            self._with_schema -= unknown
            async with self._schema_news:
                self._schema_news.notify_all()

    async def _in_words(self, request: dict[str, Any], tokens: int, schema: dict[str, Any]) -> Completion:
        told = {**request, "messages": in_words(request["messages"], schema)}
        return _found(await self._completed(told, tokens), schema)

    async def _completed(self, request: dict[str, Any], tokens: int) -> Completion:
        async def once() -> Completion:
            async with self._slot(tokens):
                return await self._read(await self._json("/chat/completions", request, {}))

        reply = await self._retried(once)
        if self._limits[1] and (used := reply.usage.prompt + reply.usage.completion):
            await self._limiter.call("refund", tokens - used, self._limits[1])
        return reply

    async def ask(
        self, path: str, request: dict[str, Any], *, form: bool = False, idempotency_key: str = ""
    ) -> Any:
        """What a route answers that is no chat completion: a JSON value. Raises what `create` raises.

        Args:
            form: send the request as a multipart form in place of JSON.
            idempotency_key: sent with every try, for servers that do once what has the same one.
        """
        self._opened()
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        headers |= {"Content-Type": "multipart/form-data"} if form else {}

        async def once() -> Any:
            async with self._slot(0):
                return await self._json(path, request, {"headers": headers})

        return await self._retried(once)

    async def get(self, path: str) -> bytes:
        """The body of what is at a path. It costs nothing, so it waits for no budget and no slot.

        Raises:
            EndpointError: as `create`; also where nothing is at the path (`status` 404).
            RequestError: no answer after all retries.
        """
        client = self._opened()
        return await self._retried(lambda: self._explained(client.get(path, cast_to=bytes)))

    def _opened(self) -> openai.AsyncOpenAI:
        if self._client is None or self._loop is not asyncio.get_running_loop():
            self.open()
        assert self._client is not None
        return self._client

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> T:
        for tries in range(self.endpoint.retries + 1):
            try:
                found = await once()
                self._answered, self._forbidden = True, 0
                return found
            except _Again as again:
                if tries == self.endpoint.retries:
                    raise again.failure from None
                spread = min(FIRST_DELAY_S * 2**tries, MAX_DELAY_S) * random.uniform(0.5, 1)
                delay = spread if again.after is None else again.after + spread
                logger.info("%s: %s; again in %.1f s", self.where, again.failure, delay)
                await asyncio.sleep(delay)
        raise AssertionError("the loop returns or raises")

    @asynccontextmanager
    async def _slot(self, tokens: int) -> AsyncIterator[None]:
        """One of the concurrent requests, once the budgets allow it. Raises CostLimitReached."""
        async with self._slots:
            self.account.check()  # before the wait too, which may be long
            if wait := await self._limiter.call("reserve", tokens, self._limits):
                await asyncio.sleep(wait)
                self.account.check()
            yield

    async def _json(self, path: str, request: dict[str, Any], options: dict[str, Any]) -> Any:
        """The JSON value of an answer. Raises `_Again` for one that is not readable."""
        data = await self._explained(self._post(path, request, options))
        try:
            return parse_body(data)
        except ValueError as error:
            message = f"{self.where}: the answer is not readable: {self._told(error)}"
            raise _Again(RequestError(message)) from None

    async def _explained(self, sent: Awaitable[bytes]) -> bytes:
        """The body of an answer. Raises `_Again` for a failure that another try may not have."""
        try:
            # The client's own limit is on every read: a server that sends a byte now and then
            # would hold this slot for ever.
            async with asyncio.timeout(self.endpoint.timeout_s):
                data = await sent
        except openai.APIStatusError as error:
            self._reached = True
            raise await self._failure(
                error.status_code, error.body, self._without_key(_said(error)), error.response.headers
            ) from None
        except (openai.APITimeoutError, TimeoutError) as error:
            # The client takes every failure to connect for a timeout.
            if lost := _lost_connection(error):
                raise _Again(self._unreachable(lost)) from None
            message = f"{self.where}: no answer in {self.endpoint.timeout_s:g} s"
            raise _Again(RequestError(message)) from None
        except openai.APIConnectionError as error:
            raise _Again(self._unreachable(error.__cause__ or error)) from None
        self._reached = True
        return data

    async def _read(self, body: Any) -> Completion:
        """The completion, which is in the account, or the failure that stands in its place."""
        reply = await self._paid(read_completion(body))
        if reply.answered or reply.refusal or reply.usage.prompt + reply.usage.completion:
            return reply
        if reply.error is None:
            raise _Again(RequestError(f"{self.where}: the answer has no choices"))
        # Some services answer 200 and put the error's status into the body, or none.
        text = self._without_key(str(reply.error))
        codes = (str(reply.error.get(name)) for name in ("status", "code"))
        told = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), None)
        status = told or (400 if about(400, reply.error, text) == "input" else 500)
        raise await self._failure(status, reply.error, text, {})

    async def _paid(self, reply: Completion) -> Completion:
        """The answer with its cost, which is in the account: the one place where money is counted."""
        prompt, completion = reply.usage.prompt, reply.usage.completion
        cost = (prompt * self.endpoint.prompt_price + completion * self.endpoint.completion_price) / 1e6
        usage = Usage(prompt, completion, cost)
        if reply.answered and not prompt + completion and self._priced:
            logger.warning("%s tells no usage: its answers count as free", self.where)
            self._priced = False  # told once
        # Before another request may take its place.
        await self.account.charge(usage)
        return replace(reply, usage=usage)

    async def _post(self, path: str, request: dict[str, Any], options: dict[str, Any]) -> bytes:
        # Answers that come together are worked on together, and the first next request leaves when the
        # last is built. One at a time, each leaves when it is built.
        async with self._turn:
            await asyncio.sleep(0)
        # `chat.completions.create` walks through the whole request to transform it, and makes a
        # random key for each: a third of all that the client does. A plain dict needs none of that.
        assert self._client is not None
        merged = {"model": self.model, **request, **self.endpoint.request}
        body = {name: value for name, value in merged.items() if value is not None}
        known: Any = {"idempotency_key": f"{id(self)}-{next(self._numbers)}", **options}
        return await self._client.post(path, body=body, cast_to=bytes, options=known)

    async def _failure(self, status: int, body: Any, text: str, headers: Any) -> Exception:
        told = f"{self.where}: {text[:500]}"
        subject = about(status, body, text)
        if subject == "either":
            # A key that was good before is most likely good still, and this input is refused.
            self._forbidden += 1
            subject = "input" if self._answered and self._forbidden < MAX_FORBIDDEN else "account"
        if subject == "input":
            return RequestError(told, status, filtered=True, body=text)
        code = body.get("code") if isinstance(body, dict) else None
        # OpenAI answers an empty account with 429, which no waiting mends.
        if subject == "account" or status in STOPS or code == "insufficient_quota":
            return EndpointError(f"{self.where} refuses this: {text[:500]}", status, text)
        failure = RequestError(told, status, body=text)
        if (status not in RETRIED and status < 500) or status == 501:
            return failure
        if self.endpoint.structured == "auto" and about_schema(failure):
            return failure
        after = retry_after(headers)
        if after is not None:
            if after > MAX_RETRY_AFTER_S:
                return failure
            await self._limiter.call("pause", after)
        return _Again(failure, after)

    def _unreachable(self, error: BaseException) -> Exception:
        address = self.endpoint.base_url or "the client's default address"
        message = f"{self.where}: cannot reach {address}: {self._told(error)}"
        # A server that never answered is most likely not there; one that did may be restarting.
        return RequestError(message) if self._reached else EndpointError(message)

    def _told(self, error: BaseException) -> str:
        return self._without_key(str(error))[:500]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) > 4 else text


def _found(reply: Completion, schema: dict[str, Any]) -> Completion:
    """An answer that a server took whole for a thought is the answer all the same."""
    if reply.text.strip() or schema_fault(reply.thoughts, schema) is not None:
        return reply
    return replace(reply, text=reply.thoughts)


def _said(error: openai.APIStatusError) -> str:
    """What a server said: the client's message, or all of the body where it took none from it."""
    told = str(error)
    if told != f"Error code: {error.status_code}":
        return told
    try:
        return f"{told} - {error.response.text.strip()}"
    except (RuntimeError, UnicodeError):  # the body was not read
        return told


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
