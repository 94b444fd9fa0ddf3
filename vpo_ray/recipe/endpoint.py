"""Recipe section of an OpenAI-compatible endpoint: the judge, the drafts and the reward may use one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AnyHttpUrl, Field, TypeAdapter

from vpo_ray.recipe.base import Place, Positive, Section


def _http_url(url: str) -> str:
    TypeAdapter(AnyHttpUrl).validate_python(url)
    return url


Price = Annotated[float, Field(ge=0)]


class Endpoint(Section):
    """An OpenAI-compatible endpoint. The key is read from the environment, never from a recipe.

    `concurrency` is that of one replica; the two budgets a minute hold for the whole cluster. With
    `azure_api_version` it is Azure OpenAI: `base_url` is the resource, the model is a deployment.
    Prices are of a million tokens, in any one currency, that of `limits.max_cost`.
    """

    base_url: Annotated[
        Annotated[str, AfterValidator(_http_url)] | None,
        Field(description="the openai client's default when unset"),
    ] = None
    api_key_env: Annotated[str | None, Field(description="variable with the key; null for none")] = (
        "OPENAI_API_KEY"
    )
    azure_api_version: str | None = None
    concurrency: Positive = 16
    timeout_s: Annotated[float, Field(gt=0)] = 120
    retries: Annotated[int, Field(ge=0)] = 5
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    prompt_price: Price = 0
    completion_price: Price = 0
    structured: Annotated[
        Literal["auto", "json_schema", "text"],
        Field(description="auto: json_schema, or text with a repair round where the server refuses it"),
    ] = "auto"
    request: Annotated[
        dict[str, Any],
        Field(description="further keys of every request; null leaves one of ours out, e.g. max_tokens"),
    ] = {}
    answers: Annotated[
        Place | None, Field(description="folder of kept answers; <out>/answers when unset")
    ] = None
    logprobs: Annotated[bool, Field(description="ask for them; read by the reward only")] = True


def refuse_keys(endpoint: Endpoint, names: Sequence[str], what: str) -> None:
    """Raises ValueError where a key is given that does nothing there."""
    for name in names:
        if getattr(endpoint, name) != Endpoint.model_fields[name].default:
            raise ValueError(f"endpoint.{name} does nothing for {what}: leave it out")
