"""The endpoints that the ingress asks: a safety classifier, a judge, a text reward."""

from __future__ import annotations

import json
import os
from typing import Any

from vpo_ray.recipe.serve import Service

MAX_ANSWER_TOKENS = 512


class ServiceError(RuntimeError):
    """An endpoint that cannot be asked, or did not give an answer that can be read."""


def client_of(service: Service, where: str) -> Any:
    """An `openai.AsyncOpenAI` of an endpoint. Raises ServiceError when its key is not set.

    Args:
        where: the section of the recipe, for the error.
    """
    import openai

    endpoint, key = service.endpoint, "none"
    if endpoint.api_key_env is not None:
        key = os.environ.get(endpoint.api_key_env, "")
        if not key:
            raise ServiceError(
                f"serve.{where}.endpoint.api_key_env: the variable {endpoint.api_key_env} is not set here"
            )
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=key, timeout=endpoint.timeout_s, max_retries=endpoint.retries
    )


async def ask_chat(client: Any, model: str, text: str, properties: dict[str, Any]) -> dict[str, Any]:
    """One question whose answer is a JSON object. Raises ServiceError when there is none."""
    import openai

    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    answer_format = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }
    try:
        reply = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=MAX_ANSWER_TOKENS,
            response_format=answer_format,
        )
        answer = json.loads(reply.choices[0].message.content or "", strict=False)
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ServiceError(f"{model} gave no answer that can be read: {type(error).__name__}") from error
    if not isinstance(answer, dict):
        raise ServiceError(f"{model} answered something else than an object")
    return answer
