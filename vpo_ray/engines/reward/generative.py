"""A vision-language model that writes its marks, behind any OpenAI-compatible endpoint: VideoScore2,
UnifiedReward 2.0 and others of their kind.

The model is sent frames and a template with the query in it, at temperature 0, and its answer is read by a
regular expression or JSON key for each dimension, without its thoughts. Where a mark is one digit and its
token's log-probabilities came with the answer, the mark is the expectation over the digits of `scale`. The
template is the one that the weights were trained with, from a file that the recipe names.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from vpo_ray.engines.reward import RewardError, Scored
from vpo_ray.engines.reward.unused_keys import unused_keys
from vpo_ray.engines.reward.written_marks import NUMBER, Marks
from vpo_ray.files.image_files import data_uri
from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.prompts.material import fill, plain
from vpo_ray.recipe import Reward
from vpo_ray.recipe.base import Positive, Source
from vpo_ray.recipe.endpoint import refuse_keys

WHERE = "reward.endpoint"
TOP = 10  # alternatives of each token: every digit, and some with white space
# The least and the number that a clip's frames are made a multiple of, by Qwen's own reader of videos.
_LEAST, _FACTOR = 4, 2

_GIVEN = "The user gave this image with the request. The frames of the video follow."
_AFTER = rf"[^:\n]*?:[\s*`\"_(\[]*{NUMBER}"
# VideoScore2 (arXiv 2509.22799, `vs2_inference.py`): 2 frames a second, marks of 1 to 5 after its thoughts,
# as "(1) visual quality: 3"; upstream's own pattern does not find each such line.
# UnifiedReward 2.0 (`point_score_APS_video_generation.py`): 16 frames at int(i T / 16), decimals, as
# "Alignment Score (1-5): 3.5".
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "videoscore2": {
        "fps": 2.0,
        "dimensions": {
            "visual_quality": rf"visual\s+quality{_AFTER}",
            "text_alignment": rf"text[\s-]+to[\s-]+video\s+alignment{_AFTER}",
            "consistency": rf"(?:physical|common[\s-]*sense)[^:\n]*?consistency{_AFTER}",
        },
        "max_tokens": 1024,
        "query": "plain",
    },
    "unifiedreward": {
        "frames": 16,
        "dimensions": {
            "alignment": rf"alignment\s+score{_AFTER}",
            "physics": rf"physics\s+score{_AFTER}",
            "style": rf"style\s+score{_AFTER}",
        },
        "expectation": False,
        "max_tokens": 1024,
        "query": "plain",
    },
    "custom": {},
}


def _named(given: Any) -> Any:
    """`[motion, look]` is short for their usual patterns."""
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return dict.fromkeys(given, "")
    return given


def _patterns(given: dict[str, str]) -> dict[str, str]:
    for name, pattern in given.items():
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
        if pattern and groups != 1:
            raise ValueError(f"{name}: {pattern!r} has {groups} groups: write one, around the number")
    return given


class GenerativeOptions(BaseModel):
    """`preset` fills the keys that are not given."""

    preset: Literal["videoscore2", "unifiedreward", "custom"] = "custom"
    template: Source = Field(description="what the model is asked, with the slot once")
    slot: str = Field("{query}", min_length=1, description="as upstream's template names it")
    query: Literal["plain", "json"] = Field("json", description="plain: without quotation marks")
    frames: Positive | None = Field(None, description="so many, the i-th at int(i T / frames)")
    fps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="so many a second, at equal distances with both ends; or give `frames`"
    )
    max_frames: Positive = Field(64, description="with fps")
    send: Literal["images", "video"] = Field("images", description="video: one part, in vLLM's own form")
    image: bool = Field(False, description="show a query's image, if it has one, before the frames")
    dimensions: Annotated[
        dict[str, str], BeforeValidator(_named), AfterValidator(_patterns), Field(min_length=1)
    ]
    answer: Literal["text", "json"] = Field("text", description="json: an object with the dimensions")
    scale: tuple[int, int] = (1, 5)
    expectation: bool = Field(True, description="over the digits, where log-probabilities come")
    max_tokens: Positive = 1024

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = dict(PRESETS.get(str(given.get("preset", "custom")), {}))
        if {"frames", "fps"} & given.keys():
            preset = {key: value for key, value in preset.items() if key not in ("frames", "fps")}
        return {**preset, **given}

    @model_validator(mode="after")
    def _reads_something(self) -> GenerativeOptions:
        if (self.frames is None) == (self.fps is None):
            raise ValueError("give either `frames` or `fps`")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: write [least, most]")
        if self.answer == "json" and any(self.dimensions.values()):
            raise ValueError("dimensions: with answer: json, give their names alone, as a list")
        return self


class Generative:
    """The builder, and the reward; its score is the mean of the dimensions."""

    Options = GenerativeOptions
    version = "1"
    takes_account = True

    def __init__(self, settings: Reward, options: GenerativeOptions, account: Any = None) -> None:
        from vpo_ray.engines.endpoint.client import EndpointClient

        self.options, self._logprobs = options, settings.endpoint.logprobs and options.expectation
        self._template = _template(options)
        self._marks = Marks(options.dimensions, options.answer == "json", options.scale)
        self._client = EndpointClient(settings.endpoint, settings.model, WHERE, account)
        self._client.read_key()

    @staticmethod
    def problems(settings: Reward, options: GenerativeOptions) -> Iterator[str]:
        if not settings.model:
            yield "model is missing: its name at the endpoint"
        yield from unused_keys(settings, "generative", "model endpoint")
        try:
            refuse_keys(settings.endpoint, ["answers"], "a reward, whose answers are its scores")
            _template(options)
        except (ValueError, TextFileError) as error:
            yield str(error)

    @staticmethod
    def variables(settings: Reward, options: GenerativeOptions) -> list[str]:
        return [settings.endpoint.api_key_env] if settings.endpoint.api_key_env is not None else []

    @staticmethod
    def dimensions(settings: Reward, options: GenerativeOptions) -> list[str]:
        return list(options.dimensions)

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        """Score videos for their queries; see `RewardModel.score`.

        Raises:
            EndpointError: the endpoint refuses the key or does not know the model.
            CostLimitReached: see `Account`.
        """
        return asyncio.run(self._score(videos, queries))

    def pick(self, times: list[float], fps: float) -> list[int]:
        """The frames that the model is sent, by the seconds of all frames and the frame rate."""
        return indices(len(times), fps, self.options)

    def score_with_images(
        self,
        videos: Sequence[bytes | str],
        queries: Sequence[str],
        images: Sequence[tuple[str, bytes] | None],
    ) -> list[Scored | Exception]:
        """As `score`; with `options.image` the model is shown the queries' images."""
        return asyncio.run(self._score(videos, queries, images if self.options.image else None))

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
        from vpo_ray.engines.endpoint.client import IMAGE_TOKENS, RequestError
        from vpo_ray.engines.reward.frames import read_frames

        try:
            frames = read_frames(video, self.pick)
            tokens = IMAGE_TOKENS * (len(frames) + (image is not None)) + self.options.max_tokens
            request = self._request(frames, query, image)
            reply = await self._client.create(request, tokens, self._marks.schema)
            if reply.refusal:
                raise RewardError(reply.refusal)
            if reply.cut:
                raise RewardError(
                    f"the answer was cut at options.max_tokens, {self.options.max_tokens}: raise it"
                )
            dimensions = self._marks.read(reply.text, reply.tokens() if self._logprobs else [])
        except RewardError as error:
            return error
        except RequestError as error:
            return RewardError(f"the endpoint failed: {error}")
        return Scored([], dimensions, sum(dimensions.values()) / len(dimensions))

    def _request(self, frames: Any, query: str, image: tuple[str, bytes] | None = None) -> dict[str, Any]:
        from vpo_ray.engines.reward.frames import image_part

        if self.options.query == "plain":
            text = fill(self._template, {"query": plain(query)})
        else:
            text = fill(self._template, query=query)
        images = [image_part(frame) for frame in frames]
        # Frames first, so that an endpoint with prefix caching reads a video once.
        given = [] if image is None else [
            {"type": "image_url", "image_url": {"url": data_uri(*image)}}, {"type": "text", "text": _GIVEN},
        ]  # fmt: skip
        content = [*given, *(images if self.options.send == "images" else [_as_video(images)]),
                   {"type": "text", "text": text}]  # fmt: skip
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.options.max_tokens,
        }
        return request | ({"logprobs": True, "top_logprobs": TOP} if self._logprobs else {})


def indices(length: int, fps: float, options: GenerativeOptions) -> list[int]:
    """Indices of the frames that the model is sent.

    Args:
        length: frames of the clip.
        fps: its rate.
    """
    if options.frames is not None:
        return [int(i * length / options.frames) for i in range(options.frames)]
    assert options.fps is not None
    # Qwen's reader: an even number, of at least 4 where there are as many; both ends, rounded half to even.
    number = int(min(max(length / fps * options.fps, _LEAST), options.max_frames, length))
    number = max(number // _FACTOR * _FACTOR, 1)
    step = (length - 1) / (number - 1) if number > 1 else 0.0
    return [round(i * step) for i in range(number)]


def _template(options: GenerativeOptions) -> str:
    """The template with the slot `{query}`. Raises TextFileError, ValueError."""
    text = read_text(options.template)
    if text.count(options.slot) != 1:
        raise ValueError(f"options.template: {options.template} needs the slot {options.slot} once")
    text = text.replace(options.slot, "{query}")
    if text.count("{query}") != 1:
        raise ValueError(f"options.template: {options.template} has a {{query}} beside its slot")
    return text


def _as_video(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Frames as one part, as vLLM takes them."""
    data = ",".join(image["image_url"]["url"].partition(",")[2] for image in images)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{data}"}}
