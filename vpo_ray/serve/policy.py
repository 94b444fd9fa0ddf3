"""The policy as the ingress calls it: its replicas behind retries, a time limit and a canary.

The requests of a replica that dies are retried on another one, if nothing has been sent to the client yet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from vpo_ray.prompts.policy_prompt import neutralise
from vpo_ray.prompts.thoughts import UnclosedThought
from vpo_ray.recipe import Serve
from vpo_ray.records import share_of
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.images import GivenImage, digest_of, takes_images
from vpo_ray.serve.metrics import ServeMetrics
from vpo_ray.serve.spoken import SpokenParts, spoken
from vpo_ray.serve.stream import Parts

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 2
ALL_THOUGHT = (
    "the policy's answer ends within a thought: raise serve.max_tokens, or turn thinking off "
    "(policy.chat_template_kwargs)"
)
# Seconds between tries, doubled each time; in the meantime Serve drops a dead replica.
FIRST_WAIT_S = 0.1

T = TypeVar("T")


class PolicyFailed(RuntimeError):
    """There is no answer: replicas died, the engine failed, or time ran out."""

    def __init__(self, message: str, *, timeout: bool = False) -> None:
        super().__init__(message)
        self.timeout = timeout


class PolicyClient:
    """Calls the engine.

    Args:
        main, canary: handles of the `PolicyServer` deployments.
        control: control tokens to break up in queries (policy_prompt.control_tokens).
    """

    def __init__(
        self,
        main: DeploymentHandle,
        canary: DeploymentHandle | None,
        settings: Serve,
        control: tuple[str, ...],
        metrics: ServeMetrics,
    ) -> None:
        self._main, self._canary = main, canary
        self._share = settings.canary.share if settings.canary else 0.0
        self.settings, self.control, self.metrics = settings, control, metrics
        self.answered = -math.inf  # the time of the engine's last answer, by time.monotonic()

    async def answer(
        self, query: str, fields: Mapping[str, Any], request_id: str, image: GivenImage | None = None
    ) -> dict[str, Any]:
        """A whole chat completion.

        Raises:
            ApiError: the engine refuses the request (too long for the model), or is overloaded.
            PolicyFailed: no answer.
        """
        handle = self._handle(query, image)
        whole = {name: value for name, value in fields.items() if name != "stream_options"}
        body = {**self._body(query, whole, request_id, image), "stream": False}

        async def once() -> dict[str, Any]:
            reply = await _cancelled_with(handle.answer.remote(body))
            if isinstance(reply, dict):
                raise _refused(reply)
            found: dict[str, Any] = json.loads(reply)
            return found

        try:
            return spoken(await self._tried(once))
        except UnclosedThought:
            raise PolicyFailed(ALL_THOUGHT) from None

    async def stream(
        self, query: str, fields: Mapping[str, Any], request_id: str, image: GivenImage | None = None
    ) -> Parts:
        """A chat completion in parts, to be closed by the caller. Returns once the first part has arrived.

        A failure after the first part ends the stream with an error event.

        Raises:
            ApiError, PolicyFailed: see `answer`.
        """
        handle = self._handle(query, image).options(stream=True)
        body = {**self._body(query, fields, request_id, image), "stream": True}
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s

        async def once() -> tuple[str, Any, SpokenParts]:
            parts, voice, ready = handle.stream.remote(body), SpokenParts(), ""
            rest = aiter(parts)
            # Nothing is sent before some text of the prompt is here, so that all can be retried.
            while not ready and (part := await _cancelled_with(parts, anext(rest, None))) is not None:
                if isinstance(part, dict):
                    raise _refused(part)
                ready = voice.feed(part)
            return ready, parts, voice

        try:
            first, parts, voice = await self._tried(once)
        except UnclosedThought:
            raise PolicyFailed(ALL_THOUGHT) from None

        def read(part: str | dict[str, Any]) -> str:
            self.answered = time.monotonic()
            try:
                if isinstance(part, str):
                    return voice.feed(part)
            except UnclosedThought:
                raise failure(PolicyFailed(ALL_THOUGHT)) from None
            error = _refused(part)
            raise failure(error) if isinstance(error, PolicyFailed) else error

        return Parts(first, parts, deadline, read, failure(self._late()))

    def _late(self) -> PolicyFailed:
        return PolicyFailed(f"no answer within {self.settings.timeout_s:g} s", timeout=True)

    async def _tried(self, once: Callable[[], Awaitable[T]]) -> T:
        wait = FIRST_WAIT_S
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                for left in range(self.settings.retries, -1, -1):
                    try:
                        found = await once()
                        self.answered = time.monotonic()
                        return found
                    except BackPressureError as error:
                        raise overloaded(self.settings.overload_status) from error
                    except (RayError, RayServeException, PolicyFailed) as error:
                        # Only the kind of error is logged: its text may contain the query.
                        logger.warning("the engine failed (%s), %d tries left", _kind(error), left)
                        if not left:
                            raise PolicyFailed("the engine failed; try again") from error
                    self.metrics.retried()
                    await asyncio.sleep(wait)
                    wait *= 2
        except TimeoutError as error:
            raise self._late() from error
        raise AssertionError("unreachable")

    def _handle(self, query: str, image: GivenImage | None) -> DeploymentHandle:
        canary = self._canary if takes_canary(query, self._share, digest_of(image)) else None
        self.metrics.variant("main" if canary is None else "canary")
        return canary or self._main

    def _body(
        self, query: str, fields: Mapping[str, Any], request_id: str, image: GivenImage | None
    ) -> dict[str, Any]:
        """What a replica is asked: a chat completion's body, and the bytes of the image beside it, where the
        policy is shown any."""
        message = {"role": "user", "content": neutralise(query, self.control)}
        shown = {} if image is None or not takes_images(self.settings) else {"image": image.data}
        return {**fields, "messages": [message], "request_id": request_id, **shown}


def takes_canary(query: str, share: float, image: str | None = None) -> bool:
    """Whether the canary answers a query. It is a function of the query and of its image's hash; a larger
    share keeps its queries."""
    return share_of("canary", query, *([] if image is None else [image])) < share


async def _cancelled_with(response: Any, result: Awaitable[Any] | None = None) -> Any:
    """Await a call; cancel the engine's work too when the caller is cancelled."""
    try:
        return await (response if result is None else result)
    except asyncio.CancelledError:
        response.cancel()
        raise


def failure(error: PolicyFailed) -> ApiError:
    """The error that a client gets when there is no answer and no fallback."""
    status, code = (504, "timeout") if error.timeout else (503, "engine_failed")
    return ApiError(status, str(error), code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def overloaded(status: int) -> ApiError:
    return ApiError(
        status,
        "too many requests are waiting; try again in a moment",
        code="overloaded",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def _refused(reply: dict[str, Any]) -> ApiError | PolicyFailed:
    if reply["code"] >= 500:
        return PolicyFailed("the engine failed")
    return ApiError(reply["code"], reply["message"], reply.get("param"))


def _kind(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    return type(cause if cause is not None else error).__name__
