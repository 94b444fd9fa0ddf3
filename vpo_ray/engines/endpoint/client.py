"""The client of an OpenAI-compatible endpoint, for every engine that uses one (chat, reward, video).

It adds to the `openai` client what a cluster needs. Replicas share a budget of requests and tokens a minute,
all of them pause when a server sends Retry-After, and errors are either the recipe's fault (`EndpointError`,
which stops the run) or one request's (`RequestError`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar
from urllib.parse import parse_qsl

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
    about_system,
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
File = tuple[str, bytes, str]  # name, content, content type

# Seconds: the first pause between tries (doubled each time), the longest, and the longest that a server
# may ask for.
FIRST_DELAY_S, MAX_DELAY_S, MAX_RETRY_AFTER_S = 0.5, 30.0, 600.0
# Consecutive 403s, which may be about the key or the input, before they count as the key's.
MAX_FORBIDDEN = 5
# Of an image, for the budget: how many it takes, only the endpoint knows.
IMAGE_TOKENS = 1000
# Requests repeated without the JSON schema to find out whether an error was due to it.
MAX_PROBES = 3


class EndpointClient:
    """Sends chat completions to one model of an endpoint.

    It opens in the event loop that uses it. With several loops, one after the other, use it as an async
    context manager in each, so that no connection stays open.

    Args:
        endpoint: its settings.
        model: the model's name at the endpoint.
        where: the recipe's key of these settings, for messages.
        account: every answer is charged to it; at its limit no request is sent.
        headers: sent with every request; their values are in no message.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        where: str,
        account: Account | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.endpoint, self.model, self.where = endpoint, model, where
        self.headers = dict(headers or {})
        self.account = account or Account()
        self._key = ""
        self._reached = self._answered = False
        self._forbidden = 0  # 403s since the last answer
        # Whether the server takes JSON schemas; None while unknown.
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
        """Make the connection pool. Raises EndpointError: no key, or not a valid address."""
        self._key = self.read_key()
        # Our retries respect the budget, so the client's own are off.
        options: dict[str, Any] = {
            "api_key": self._key,
            "timeout": self.endpoint.timeout_s,
            "max_retries": 0,
            "default_headers": self.headers,
            # aiohttp takes half of the CPU time of the client's default transport.
            "http_client": openai.DefaultAioHttpClient(timeout=self.endpoint.timeout_s),
        }
        azure = self.endpoint.azure_api_version
        address, _, query = (self.endpoint.base_url or "").partition("#")[0].partition("?")
        options["default_query"] = dict(parse_qsl(query, keep_blank_values=True))
        try:
            if azure is not None:
                self._client = openai.AsyncAzureOpenAI(azure_endpoint=address, api_version=azure, **options)
            else:
                self._client = openai.AsyncOpenAI(base_url=address or None, **options)
        except (openai.OpenAIError, ValueError) as error:
            raise EndpointError(f"{self.where}: {self._message(error)}") from None
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
        """One chat completion, charged to the account.

        Any answer that was generated is returned, since it was paid for: check its `refusal` and `text`.

        Args:
            request: the body without the model; the recipe's `request` overrides it.
            tokens: an estimate of prompt and completion tokens, for the budget.
            schema: of the JSON object that the text should be. With `structured: auto`, a server that
                refuses schemas gets them as text in the last message from then on. The text may still
                be something else: see `answers.find_object`.

        Raises:
            EndpointError: the key is refused, the model is not known, or there is no such server.
            RequestError: this request has no answer after all retries.
            CostLimitReached: the limit is reached; nothing was sent.
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
        """Repeat a request with its schema in words, if the error may be due to the schema; else raise it."""
        assert isinstance(refused, EndpointError | RequestError)
        async with self._schema_news:
            # A running request may settle the question: one with a schema by succeeding, one in words too.
            await self._schema_news.wait_for(lambda: self._schemas is not None or not self._with_schema)
            unknown = self._schemas is None
            if self._schemas is not False and not about_schema(refused):
                if self._schemas or self._probes >= MAX_PROBES:
                    raise refused
                self._probes += 1
            self._with_schema += unknown
        try:
            reply = await self._in_words(request, tokens, schema)
            # A server that was down may have come back in between: the second time counts.
            if self._schemas is None and not (may_pass(refused) and self._probes < 2):
                logger.warning(
                    "%s takes no JSON schema (%s): it is given in words", self.where, refused.status
                )
                self._schemas = False
            return reply
        finally:
            self._with_schema -= unknown
            async with self._schema_news:
                self._schema_news.notify_all()

    async def _in_words(self, request: dict[str, Any], tokens: int, schema: dict[str, Any]) -> Completion:
        worded = {**request, "messages": in_words(request["messages"], schema)}
        return _found(await self._completed(worded, tokens), schema)

    async def _completed(self, request: dict[str, Any], tokens: int) -> Completion:
        async def once() -> Completion:
            async with self._slot(tokens):
                return await self._read(await self._json("/chat/completions", request, {}))

        reply = await self._retried(once)
        if self._limits[1] and (used := reply.usage.prompt + reply.usage.completion):
            await self._limiter.call("refund", tokens - used, self._limits[1])
        return reply

    async def ask(
        self,
        path: str,
        request: dict[str, Any],
        *,
        form: bool = False,
        files: Mapping[str, File] | None = None,
        idempotency_key: str = "",
    ) -> Any:
        """The answer, a JSON value, of a route other than chat completions. Raises what `create` raises.

        Args:
            form: send a multipart form in place of JSON.
            files: of the form, by the names of its fields.
            idempotency_key: sent with every try, for servers that run requests of one key only once.
        """
        self._opened()
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        headers |= {"Content-Type": "multipart/form-data"} if form or files else {}

        async def once() -> Any:
            async with self._slot(0):
                return await self._json(path, request, {"headers": headers}, files)

        return await self._retried(once)

    async def get(self, path: str) -> bytes:
        """The body at a path, by GET. It is free, so it waits for no budget and no slot.

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
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _slot(self, tokens: int) -> AsyncIterator[None]:
        """One of the concurrent requests, once the budgets allow it. Raises CostLimitReached."""
        async with self._slots:
            self.account.check()  # before the wait too, which may be long
            if wait := await self._limiter.call("reserve", tokens, self._limits):
                await asyncio.sleep(wait)
                self.account.check()
            yield

    async def _json(
        self,
        path: str,
        request: dict[str, Any],
        options: dict[str, Any],
        files: Mapping[str, File] | None = None,
    ) -> Any:
        """The JSON value of an answer. Raises `_Again` for one that is not readable."""
        data = await self._explained(self._post(path, request, options, files))
        try:
            return parse_body(data)
        except ValueError as error:
            message = f"{self.where}: the answer is not readable: {self._message(error)}"
            raise _Again(RequestError(message)) from None

    async def _explained(self, sent: Awaitable[bytes]) -> bytes:
        """The body of an answer. Raises `_Again` for a failure that may pass."""
        try:
            # The client's own limit is per read: a server that sends a byte now and then would hold this
            # slot forever.
            async with asyncio.timeout(self.endpoint.timeout_s):
                data = await sent
        except openai.APIStatusError as error:
            self._reached = True
            first = next(iter(error.response.history), error.response)
            if first.request.method != error.response.request.method:  # the question was not sent on
                led = f"{first.url} leads to {error.response.url}: give that in base_url"
                raise EndpointError(f"{self.where}: {led}", error.status_code) from None
            raise await self._failure(
                error.status_code, error.body, self._without_key(_said(error)), error.response.headers
            ) from None
        except (openai.APITimeoutError, TimeoutError) as error:
            # The client reports every failure to connect as a timeout.
            if lost := _lost_connection(error):
                raise _Again(self._unreachable(lost)) from None
            message = f"{self.where}: no answer in {self.endpoint.timeout_s:g} s"
            raise _Again(RequestError(message)) from None
        except openai.APIConnectionError as error:
            raise _Again(self._unreachable(error.__cause__ or error)) from None
        self._reached = True
        return data

    async def _read(self, body: Any) -> Completion:
        """The completion, charged to the account. Raises the error that the body has in place of one."""
        reply = await self._paid(read_completion(body))
        if reply.answered or reply.refusal or reply.usage.prompt + reply.usage.completion:
            return reply
        if reply.error is None:
            raise _Again(RequestError(f"{self.where}: the answer has no choices"))
        # Some services answer 200 with the error's status in the body, or with none.
        text = self._without_key(str(reply.error))
        codes = (str(reply.error.get(name)) for name in ("status", "code"))
        given = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), None)
        status = given or (400 if about(400, reply.error, text) == "input" else 500)
        raise await self._failure(status, reply.error, text, {})

    async def _paid(self, reply: Completion) -> Completion:
        """The answer with its cost, charged to the account: the only place where costs are counted."""
        prompt, completion = reply.usage.prompt, reply.usage.completion
        cost = (prompt * self.endpoint.prompt_price + completion * self.endpoint.completion_price) / 1e6
        usage = Usage(prompt, completion, cost)
        if reply.answered and not prompt + completion and self._priced:
            logger.warning("%s reports no usage: its answers count as free", self.where)
            self._priced = False  # logged once
        # Before another request takes its slot.
        await self.account.charge(usage)
        return replace(reply, usage=usage)

    async def _post(
        self,
        path: str,
        request: dict[str, Any],
        options: dict[str, Any],
        files: Mapping[str, File] | None,
    ) -> bytes:
        # One request at a time: otherwise those that are ready together are all built before the first
        # is sent.
        async with self._turn:
            await asyncio.sleep(0)
        # `chat.completions.create` transforms the whole request and makes a random key for each: a third
        # of the client's CPU time. A plain dict avoids that.
        assert self._client is not None
        merged = {"model": self.model, **request, **self.endpoint.request}
        body = {name: value for name, value in merged.items() if value is not None}
        known: Any = {"idempotency_key": f"{id(self)}-{next(self._numbers)}", **options}
        return await self._client.post(path, body=body, files=files, cast_to=bytes, options=known)

    async def _failure(self, status: int, body: Any, text: str, headers: Any) -> Exception:
        message = f"{self.where}: {text[:500]}"
        subject = about(status, body, text)
        if subject == "either":
            # A key that worked before most likely still does, so the input is refused.
            self._forbidden += 1
            subject = "input" if self._answered and self._forbidden < MAX_FORBIDDEN else "account"
        if subject == "input":
            return RequestError(message, status, filtered=True, body=text)
        code = body.get("code") if isinstance(body, dict) else None
        # OpenAI answers an empty account with 429, but waiting does not help.
        if subject == "account" or status in STOPS or code == "insufficient_quota":
            return EndpointError(f"{self.where} refuses this: {text[:500]}", status, text)
        failure = RequestError(message, status, body=text)
        if (status not in RETRIED and status < 500) or status == 501:
            return failure
        if about_system(failure) or (self.endpoint.structured == "auto" and about_schema(failure)):
            return failure
        after = retry_after(headers, text if status in (429, 503) else "")
        if after is not None:
            if after > MAX_RETRY_AFTER_S:  # a day's quota: every row would fail
                later = f"{self.where} asks for a pause of {after:,.0f} s, run again then: {text[:500]}"
                return EndpointError(later, status, text)
            await self._limiter.call("pause", after)
        return _Again(failure, after)

    def _unreachable(self, error: BaseException) -> Exception:
        address = self.endpoint.base_url or "the client's default address"
        message = f"{self.where}: cannot reach {address}: {self._message(error)}"
        # A server that never answered most likely does not exist; one that did may be restarting.
        return RequestError(message) if self._reached else EndpointError(message)

    def _message(self, error: BaseException) -> str:
        return self._without_key(str(error))[:500]

    def _without_key(self, text: str) -> str:
        for secret in (self._key, *self.headers.values()):
            text = text.replace(secret, "***") if len(secret) > 4 else text
        return text


async def results_of_all(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or the first error once all have ended: every answer is paid for."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    if tasks:
        await asyncio.wait(tasks)
    return [task.result() for task in tasks]


def _found(reply: Completion, schema: dict[str, Any]) -> Completion:
    """The answer, taken from its thoughts where a server mistook all of it for a thought, or from the call of
    a tool by which a server has its model keep to a schema."""
    if reply.text.strip():
        return reply
    others = (other for other in (reply.thoughts, reply.called) if schema_fault(other, schema) is None)
    return replace(reply, text=next(others, reply.text))


def _said(error: openai.APIStatusError) -> str:
    """The server's message, or the whole body where the client found none in it."""
    message = str(error)
    if message != f"Error code: {error.status_code}":
        return message
    try:
        return f"{message} - {error.response.text.strip()}"
    except (RuntimeError, UnicodeError):  # the body was not read
        return message


class _Again(Exception):
    """A try that failed, to be repeated; `failure` is raised after the last."""

    def __init__(self, failure: Exception, after: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.after = failure, after


def _lost_connection(error: BaseException) -> BaseException | None:
    """The connection failure behind an error, if there is one that is not a timeout."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, aiohttp.ClientConnectionError) and not isinstance(cause, TimeoutError):
            return cause
        cause = cause.__cause__
    return None
