"""Answers of `/v1/chat/completions`: those of the engine as they arrive, or checked as a whole first."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, Response

from vpo_ray.serve.answers import (
    completion,
    completion_events,
    delta_texts,
    texts_of,
    usage_in,
    without_usage,
)
from vpo_ray.serve.feedback import FeedbackDesk, noted
from vpo_ray.serve.http import Events
from vpo_ray.serve.images import GivenImage
from vpo_ray.serve.keys import Key
from vpo_ray.serve.optimiser import Optimiser, refusal
from vpo_ray.serve.optimize_schema import Optimization
from vpo_ray.serve.policy import PolicyFailed
from vpo_ray.serve.stream import Parts


class ChatDesk:
    """What an ingress does for chats."""

    def __init__(self, optimiser: Optimiser, feedback: FeedbackDesk | None) -> None:
        self.optimiser, self.feedback = optimiser, feedback
        self.policy, self.settings = optimiser.policy, optimiser.settings
        self.metrics = optimiser.policy.metrics

    async def answer(
        self, query: str, fields: dict[str, Any], image: GivenImage | None, key: Key, request_id: str
    ) -> Response:
        """The prompt of a query as a chat completion, whole or streamed.

        Raises:
            ApiError: the gate refuses the query, or the engine the request.
            PolicyFailed: no answer, and the recipe has no fallback.
        """
        answer = self._checked if self.optimiser.needs_whole_prompts else self._direct
        return await answer(query, fields, image, key, request_id)

    async def _direct(
        self, query: str, fields: dict[str, Any], image: GivenImage | None, key: Key, request_id: str
    ) -> Response:
        """The engine's own answer, passed on as it arrives."""
        checked = await self.optimiser.check_query(query, image=image)
        result = self.optimiser.result(checked)
        if checked.refused:
            self.metrics.optimised(result, key.name)
            raise refusal(result.safety)
        try:
            if fields["stream"]:
                asked = {**fields, "stream_options": {"include_usage": True}}
                parts = await self.policy.stream(query, asked, request_id, image)
                opening = await self._opening(parts)
                self.metrics.optimised(result, key.name)
                return Events(self._passed(opening, parts, key, _wants_usage(fields)), source=parts)
            answer = await self.policy.answer(query, fields, request_id, image)
            if self.settings.fallback and not any(texts_of(answer)):
                raise PolicyFailed("the prompt is empty")
        except PolicyFailed:
            if not self.settings.fallback:
                raise
            return self._answer(await self.optimiser.fall_back(checked), fields, key, request_id)
        self.metrics.optimised(result, key.name)
        self.metrics.tokens(answer.get("usage") or {}, key.name)
        return JSONResponse(answer)

    async def _opening(self, parts: Parts) -> list[str]:
        """The events up to the first text, where the raw query would be sent instead of none.

        Raises:
            PolicyFailed: there is no text.
        """
        opening: list[str] = []
        if not self.settings.fallback:
            return opening
        try:
            async for part in parts:
                opening.append(part)
                if any(delta_texts(part)):
                    return opening
            raise PolicyFailed("the prompt is empty")
        except BaseException:
            await parts.aclose()
            raise

    async def _passed(
        self, opening: list[str], parts: Parts, key: Key, with_usage: bool
    ) -> AsyncIterator[str]:
        def counted(part: str) -> str:
            if usage := usage_in(part):
                self.metrics.tokens(usage, key.name)
                return part if with_usage else without_usage(part)
            return part

        for part in opening:
            yield counted(part)
        async for part in parts:
            if text := counted(part):
                yield text

    async def _checked(
        self, query: str, fields: dict[str, Any], image: GivenImage | None, key: Key, request_id: str
    ) -> Response:
        """An answer that is checked as a whole before any of it is sent."""
        result = await self.optimiser(query, fields, request_id, image=image)
        return self._answer(noted(self.feedback, key, query, result, image=image), fields, key, request_id)

    def _answer(self, result: Optimization, fields: dict[str, Any], key: Key, request_id: str) -> Response:
        self.metrics.optimised(result, key.name)
        if result.safety.outcome == "refused":
            raise refusal(result.safety)
        whole = completion(result, request_id)
        if not fields["stream"]:
            return JSONResponse(whole)
        return Events(completion_events(whole, _wants_usage(fields)))


def _wants_usage(fields: dict[str, Any]) -> bool:
    return bool(fields.get("stream_options", {}).get("include_usage"))
