"""A scorer's own server as the reward: for scorers whose dependencies fit no environment of ours.

    POST {endpoint.base_url}/score      query, and a file `video` or the text `video_uri`, as a multipart form
        -> {"dimensions": {"motion": 0.4}, "score": 0.4}, or {"error": "why this video has no score"}
    GET {endpoint.base_url}/identity    -> {"name": "motion", "version": "2"}, where the server tells

`examples/http-reward` is such a server. Retries, pauses and errors are those of every endpoint: see
`engines.endpoint.client`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.files.image_files import media_type
from vpo_ray.recipe import Endpoint, Reward
from vpo_ray.recipe.endpoint import refuse_keys

if TYPE_CHECKING:
    from vpo_ray.engines.endpoint.client import EndpointClient

WHERE = "reward.endpoint"
IDENTITY_S = 10.0  # what a server may take to say who it is
_OF_LLMS = ("azure_api_version", "tokens_per_minute", "prompt_price", "completion_price", "structured",
            "answers", "logprobs")  # fmt: skip
_OPENAI_KEY = Endpoint.model_fields["api_key_env"].default


class HttpScorerOptions(BaseModel):
    name: str = Field("", description="of what the server computes")
    version: str = Field("", description="of that; where the server tells one, it must be this")
    send: Literal["bytes", "uri"] = Field("bytes", description="uri: the server reads the video store itself")
    headers: dict[str, str] = Field({}, description="variables with the values, by the headers' names")
    dimensions: list[str] = Field([], description="that every answer must have")


class HttpScorer:
    """The builder, and the reward. The score is the server's, or the mean of the dimensions.

    Raises:
        EndpointError: a variable of `headers` is not set here, or the server cannot be reached.
        ValueError: the server has another version than the recipe says.
    """

    Options = HttpScorerOptions
    version = "1"

    def __init__(self, settings: Reward, options: HttpScorerOptions) -> None:
        self.options, self.by_uri = options, options.send == "uri"
        self._client = _client(settings.endpoint, settings.model, options)
        self._model = {} if settings.model else {"model": None}
        self._client.read_key()
        told = asyncio.run(_told(self._client))
        for key in ("name", "version"):
            if (said := getattr(options, key)) and str(told.get(key, said)) != said:
                raise ValueError(
                    f"the server at {settings.endpoint.base_url} says {key} {told[key]!r}, the recipe's "
                    f"options.{key} {said!r}"
                )

    @staticmethod
    def identity(settings: Reward, options: HttpScorerOptions) -> str:
        """What the recipe and the server say that it computes. Raises EndpointError, RequestError."""
        brief = settings.endpoint.model_copy(update={"retries": 0, "timeout_s": IDENTITY_S})
        told = asyncio.run(_told(_client(brief, settings.model, options)))
        said = {"name": options.name, "version": options.version, "model": settings.model}
        return json.dumps({**told, **{key: value for key, value in said.items() if value}}, sort_keys=True)

    @staticmethod
    def problems(settings: Reward, options: HttpScorerOptions) -> Iterator[str]:
        if settings.endpoint.base_url is None:
            yield "endpoint.base_url is missing: the address of the scorer's server"
        yield from unused_keys(settings, "http", "model endpoint")
        try:
            refuse_keys(settings.endpoint, _OF_LLMS, "kind: http")
        except ValueError as error:
            yield str(error)

    @staticmethod
    def variables(settings: Reward, options: HttpScorerOptions) -> list[str]:
        key = settings.endpoint.api_key_env
        return [*options.headers.values(), *([key] if key not in (None, _OPENAI_KEY) else [])]

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """Score videos for their queries; see `RewardModel.score`.

        Raises:
            EndpointError: the server is not there, has no route `/score` or refuses the key.
        """
        return asyncio.run(self._score(videos, queries))

    def score_with_images(
        self,
        videos: Sequence[bytes | str],
        queries: Sequence[str],
        images: Sequence[tuple[str, bytes] | None],
    ) -> list[Scored | Exception]:
        """As `score`; a query's image is sent as the file `image`."""
        return asyncio.run(self._score(videos, queries, images))

    async def _score(
        self,
        videos: Sequence[bytes | str],
        queries: Sequence[str],
        images: Sequence[tuple[str, bytes] | None] | None = None,
    ) -> list[Scored | Exception]:
        from vpo_ray.engines.endpoint.client import results_of_all

        shown = [None] * len(videos) if images is None else images
        async with self._client:
            return await results_of_all(self._one(*one) for one in zip(videos, queries, shown, strict=True))

    async def _one(
        self, video: bytes | str, query: str, image: tuple[str, bytes] | None
    ) -> Scored | Exception:
        from vpo_ray.engines.endpoint.client import RequestError

        fields: dict[str, Any] = {"query": query, **self._model}
        files = {}
        if isinstance(video, str):
            fields["video_uri"] = video
        else:
            files["video"] = ("video.mp4", video, "video/mp4")
        if image is not None:
            name, data = image
            files["image"] = (name, data, media_type(name))
        try:
            return read_scores(
                await self._client.ask("/score", fields, form=True, files=files or None),
                self.options.dimensions,
            )
        except RequestError as error:
            return RewardError(f"the scorer failed: {error}")
        except RewardError as error:
            return error


def read_scores(answer: Any, required: Sequence[str] = ()) -> Scored:
    """The scores in a server's answer. Raises RewardError where it has none, with the server's own error."""
    if not isinstance(answer, Mapping):
        raise RewardError(f"the scorer's answer is no JSON object: {_shown(answer)}")
    if error := answer.get("error"):
        raise RewardError(f"the scorer says: {_shown(error)}")
    given = answer.get("dimensions")
    if given is not None and not isinstance(given, Mapping):
        raise RewardError(f"the scorer's `dimensions` are no JSON object: {_shown(given)}")
    dimensions = {_text(name): _number(name, value) for name, value in (given or {}).items()}
    if missing := [name for name in required if name not in dimensions]:
        raise RewardError(f"the scorer's answer has no {', '.join(missing)}: {_shown(answer)}")
    if answer.get("score") is not None:
        return Scored([], dimensions, _number("score", answer["score"]))
    if not dimensions:
        raise RewardError(f"the scorer's answer has no dimensions and no score: {_shown(answer)}")
    return Scored([], dimensions, sum(dimensions.values()) / len(dimensions))


def _number(name: Any, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RewardError(f"the scorer's {_text(name)} is no number: {_shown(value)}")
    if not math.isfinite(value):
        raise RewardError(f"the scorer's {_text(name)} is not finite: {_shown(value)}")
    return float(value)


def _text(value: Any) -> str:
    """Text that every table holds: a lone surrogate becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode()[:200]


def _shown(value: Any) -> str:
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _client(endpoint: Endpoint, model: str, options: HttpScorerOptions) -> EndpointClient:
    """Raises EndpointError: a variable is not set here."""
    from vpo_ray.engines.endpoint.client import EndpointClient, EndpointError

    for header, variable in options.headers.items():
        if not os.environ.get(variable):
            raise EndpointError(f"reward.options.headers.{header}: the variable {variable} is not set here")
    headers = {header: os.environ[variable] for header, variable in options.headers.items()}
    # The default is a key of LLMs, and nothing for others.
    key = None if endpoint.api_key_env == _OPENAI_KEY else endpoint.api_key_env
    own = endpoint.model_copy(update={"api_key_env": key})
    return EndpointClient(own, model, WHERE, headers=headers)


async def _told(client: EndpointClient) -> dict[str, Any]:
    """What the server says of itself; nothing where it has no such route."""
    from vpo_ray.engines.endpoint.client import EndpointError, RequestError

    async with client:
        try:
            told = json.loads(await client.get("/identity"))
        except (EndpointError, RequestError) as error:
            if error.status in (404, 405, 501):
                return {}
            raise
        except ValueError as error:
            raise ValueError(f"{client.where}: /identity gives no JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{client.where}: /identity gives no JSON object: {_shown(told)}")
    return told
