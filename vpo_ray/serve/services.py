"""The endpoints that the ingress uses: a safety classifier, a judge, a text reward.

The client is that of a run, so every key of `endpoint` means the same. An answer may contain a query, so
errors give no more than its status.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from vpo_ray.engines.chat.images import TOLD
from vpo_ray.engines.endpoint.client import IMAGE_TOKENS, EndpointClient, EndpointError, RequestError
from vpo_ray.prompts.answers import find_object, object_schema, schema_fault
from vpo_ray.recipe.serve import Service
from vpo_ray.serve.images import GivenImage

MAX_ANSWER_TOKENS = 512

T = TypeVar("T")


class ServiceError(RuntimeError):
    """An endpoint that cannot be used, or gave no readable answer."""


class Declined(ServiceError):
    """An endpoint whose model or filter refuses this text."""


class ServiceClient:
    """Asks one service, within its time limit.

    Args:
        where: its key in the recipe's `serve` section, for errors.

    Raises:
        ServiceError: its key is not set.
    """

    def __init__(self, service: Service, where: str) -> None:
        self.service, self.where = service, where
        self._client = EndpointClient(service.endpoint, service.model, f"serve.{where}.endpoint")
        try:
            self._client.read_key()
        except EndpointError as error:
            raise ServiceError(str(error)) from error

    async def ask(self, path: str, request: dict[str, Any]) -> Any:
        """A route's answer, a JSON value. Raises ServiceError."""
        return await self._in_time(self._client.ask(path, request))

    def shown(self, image: GivenImage | None) -> list[dict[str, Any]]:
        """The parts of a message that show an image; none where the service reads text alone."""
        return [] if image is None or self.service.images == "ignore" else [image.part]

    async def chat(
        self, text: str, properties: dict[str, Any], needed: str, image: GivenImage | None = None
    ) -> dict[str, Any]:
        """The model's answer to a question, a JSON object. Only the `needed` property is sure to be there and
        of its type. Raises ServiceError.

        Args:
            image: of the query that the question is about.
        """
        schema = object_schema(properties)
        shown = self.shown(image)
        content = [*shown, *({"type": "text", "text": one} for one in (TOLD, text))] if shown else text
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
        }
        if self.service.chat_template_kwargs:
            request["chat_template_kwargs"] = self.service.chat_template_kwargs
        tokens = len(text.encode()) // 4 + IMAGE_TOKENS * len(shown) + MAX_ANSWER_TOKENS
        reply = await self._in_time(self._client.create(request, tokens, schema))
        if reply.refusal:
            raise Declined(f"{self.where} declined to answer")
        least = {"type": "object", "properties": {needed: properties[needed]}, "required": [needed]}
        found = find_object(reply.text, least)
        if schema_fault(found, least) is not None:
            raise ServiceError(f"{self.where} gave no readable answer (finish_reason {reply.finish})")
        answer: dict[str, Any] = json.loads(found, strict=False)
        return answer

    async def _in_time(self, asked: Coroutine[Any, Any, T]) -> T:
        endpoint = self.service.endpoint
        try:
            # A budget or a server's Retry-After may ask for longer than a caller waits.
            async with asyncio.timeout((endpoint.retries + 1) * (endpoint.timeout_s + 1)):
                return await asked
        except (EndpointError, RequestError) as error:
            if error.filtered:
                raise Declined(f"{self.where} refused this text") from None
            raise ServiceError(f"{self.where} failed (status {error.status})") from None
        except TimeoutError:
            raise ServiceError(f"{self.where} did not answer in time") from None
