"""Recipe sections of OpenAI-compatible endpoints: of LLMs, and of services that render videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AnyHttpUrl, Field, TypeAdapter, model_validator

from vpo_ray.recipe.base import Place, Positive, Section

# What a client puts behind an address itself.
_ROUTE = "/chat/completions"


def _http_url(url: str) -> str:
    TypeAdapter(AnyHttpUrl).validate_python(url)
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("it has a user or password: name a variable with the key in api_key_env")
    if parts.path.rstrip("/").endswith(_ROUTE):
        raise ValueError(f"leave {_ROUTE} out, which is asked for behind it")
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
        Field(description="the openai client's default when unset; its query goes with every request"),
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


class VideoEndpoint(Endpoint):
    """A service of video jobs. `requests_per_minute` are jobs that are created, `concurrency` the jobs of one
    replica that are under way; `timeout_s` is of one request, `render.time_limit_s` of a job. `request` says
    all that a video is made with but its prompt and seed, in the service's own words; `seed: null` leaves
    the seed out."""

    form: Annotated[
        bool,
        Field(description="send multipart forms, as OpenAI and vLLM-Omni take them; false: JSON"),
    ] = True
    video_price: Annotated[Price, Field(description="of a video")] = 0
    second_price: Annotated[Price, Field(description="of a second of video, of request.seconds")] = 0

    @property
    def cost(self) -> float:
        """Of one video."""
        return self.video_price + self.second_price * float(self.request.get("seconds") or 0)

    @model_validator(mode="after")
    def _all_used(self) -> VideoEndpoint:
        refuse_keys(self, _OF_LLMS, "a video service")
        try:
            if self.second_price and not self.cost > self.video_price:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError("second_price needs the number request.seconds") from None
        return self


_OF_LLMS = ("azure_api_version", "tokens_per_minute", "prompt_price", "completion_price", "structured",
            "answers", "logprobs")  # fmt: skip


def refuse_keys(endpoint: Endpoint, names: Sequence[str], what: str) -> None:
    """Raises ValueError where a key is given that does nothing there."""
    for name in names:
        if getattr(endpoint, name) != Endpoint.model_fields[name].default:
            raise ValueError(f"endpoint.{name} does nothing for {what}: leave it out")
