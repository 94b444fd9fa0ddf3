"""Requests and answers of `/v1/optimize`.

They have what the chat API has no fields for: whether the query was changed, what the safety gate said, the
other candidates. Nothing here needs Ray or an engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vpo_ray.flags import split_flags
from vpo_ray.prompts.conditions import CAPTION_FIELDS
from vpo_ray.recipe import Serve
from vpo_ray.recipe.profiles import LanguageCode
from vpo_ray.serve.errors import ApiError, explained
from vpo_ray.serve.images import AttachedImage, check_film, no_images, refuse_other_images, takes_images
from vpo_ray.serve.request import RequestBody, Text, check_model, check_query, read_json
from vpo_ray.serve.wishes import NO_WISHES, Effort, Wishes

Image64 = Annotated[str, Field(min_length=1)]
IMAGE = "PNG, JPEG or WebP: a data: URI, or its base64"
Terms = Annotated[list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(max_length=16)]


class OptimizeRequest(RequestBody):
    """One query, or several. `n` asks for candidates: the best is `prompt`, others `alternatives`.

    Where the policy sees, `image` is the query's picture, and `images` those of several queries, null for one
    that has none; 32 MiB together. With effort `videos` the videos begin with it.

    `keep`, `avoid`, `language`, `max_words`, `format`, `skip_if_words` and `effort` are wishes
    (`serve.wishes`). With effort `videos` the answer is a job that looks for the best prompt with at most
    `budget` videos.
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["query"]}, {"required": ["queries"]}]},
    )

    query: Annotated[Text, Field(min_length=1)] | None = None
    queries: Annotated[list[Text], Field(min_length=1)] | None = None
    image: Annotated[Image64 | None, Field(description=IMAGE)] = None
    images: Annotated[list[Image64 | None] | None, Field(description="of each query, as `image`")] = None
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stream: bool | None = None
    keep: Terms | None = None
    avoid: Terms | None = None
    language: LanguageCode | None = None
    max_words: Annotated[int, Field(ge=1)] | None = None
    format: Literal["text", "json"] | None = None
    skip_if_words: Annotated[int, Field(ge=1)] | None = None
    effort: Effort | Literal["videos"] | None = None
    budget: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _either(self) -> OptimizeRequest:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either `query` or `queries`")
        if self.stream and self.queries is not None:
            raise ValueError("`stream` takes one `query`")
        if self.image is not None and self.query is None:
            raise ValueError("`image` goes with `query`; give `images`, one for each of `queries`")
        if self.images is not None and len(self.images) != len(self.queries or []):
            raise ValueError("`images` has one for each of `queries`, or null for one without an image")
        return self


class Rank(BaseModel):
    """What the ranker said of a candidate; higher is better."""

    prompt: str
    score: float
    reason: str | None = None


class SafetyOutcome(BaseModel):
    """What the gate said. `reason` is set unless everything passed."""

    outcome: Literal["pass", "rewritten", "refused"] = "pass"
    reason: str | None = None
    checked: list[Literal["query", "prompt"]] = []


class Latency(BaseModel):
    """Seconds of this query, in total and by part."""

    total: float = 0
    gate: float = 0
    optimiser: float = 0
    ranking: float = 0


class TokenUsage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class GeneratorFlag(BaseModel):
    """A setting of the video generator from the query, such as ar 16:9; see `vpo_ray.flags`."""

    name: str
    value: str


class Optimization(BaseModel):
    """The answer to a query. `prompt` is null if it was refused, and the raw query if `fallback`."""

    object: Literal["optimization"] = "optimization"
    # For /v1/feedback; null where the endpoint keeps nothing of this caller.
    id: str | None = None
    prompt: str | None = None
    alternatives: list[str] = []
    changed: bool = False
    flags: list[GeneratorFlag] = []
    safety: SafetyOutcome = SafetyOutcome()
    fallback: bool = False
    # The query was long enough to be left as it is, as the request wished.
    skipped: bool = False
    # The prompt, as all that the policy wrote, ended at max_tokens.
    cut: bool = False
    # Wishes of the request that the prompt does not meet.
    unmet: list[str] = []
    ranking: list[Rank] | None = None
    model: str
    system_fingerprint: str | None = None
    usage: TokenUsage = TokenUsage()
    latency: Latency = Latency()


class OptimizationList(BaseModel):
    """The answers to several queries, in order; a failed one has `error`."""

    object: Literal["list"] = "list"
    data: list[Optimization | dict[str, Any]]
    model: str


@dataclass(frozen=True)
class Asked:
    """A validated request: its queries without generator flags, the flags, the engine's fields, and an image
    or None for each query."""

    queries: list[str]
    flags: list[list[GeneratorFlag]]
    fields: dict[str, Any]
    single: bool = True
    stream: bool = False
    wishes: Wishes = NO_WISHES
    # Videos at most, of effort `videos`.
    budget: int | None = None
    images: list[AttachedImage | None] = field(default_factory=list)


def parse_optimize(body: bytes, settings: Serve) -> Asked:
    """Parse and validate a body.

    Raises:
        ApiError: 400 for a body that is not JSON or an empty query, 422 for wrong fields, or for more effort
            where nothing is ranked, 404 for an unknown model, 413 for too long a query or too many of them.
    """
    value = read_json(body)
    if isinstance(value, dict) and value.get("image_url") is not None and not takes_images(settings):
        raise no_images("image_url")
    refuse_other_images(value)
    try:
        request = OptimizeRequest.model_validate(value)
    except ValidationError as error:
        raise explained(error, 422) from None
    check_model(request.model, settings)
    n = request.n or 1
    if n > settings.max_n:
        raise ApiError(422, f"n is {n}, at most {settings.max_n} is allowed here", "n")
    if request.effort == "high" and settings.best_of is None:
        message = "effort high has no effect: this endpoint ranks no candidates (serve.best_of)"
        raise ApiError(422, message, "effort")
    queries = [request.query] if request.queries is None else request.queries
    if len(queries) > settings.max_queries:
        message = f"{len(queries)} queries, at most {settings.max_queries} are allowed"
        raise ApiError(413, message, "queries", "too_many_queries")
    for index, query in enumerate(queries):
        check_query(query or "", settings, "query" if request.queries is None else f"queries.{index}")
    separated = [separate(query or "") for query in queries]
    fields = engine_fields(settings, n, request.seed, request.temperature)
    texts, found = [text for text, _ in separated], [flags for _, flags in separated]
    wishes = Wishes(
        tuple(request.keep or ()),
        request.max_words,
        request.skip_if_words,
        "medium" if request.effort is None or request.effort == "videos" else request.effort,
        tuple(request.avoid or ()),
        request.language,
        tuple(settings.caption_fields or CAPTION_FIELDS) if request.format == "json" else (),
    )
    budget = _budget(request, settings)
    images = _attached(request, settings)
    single, stream = request.queries is None, bool(request.stream)
    return Asked(texts, found, fields, single, stream, wishes, budget, images)


def _attached(request: OptimizeRequest, settings: Serve) -> list[AttachedImage | None]:
    """An image or None for each query. Raises ApiError (400) where the policy, or with effort `videos` the
    video model, does not take them."""
    given = request.image is not None or any(request.images or [])
    if request.effort == "videos":
        check_film(settings, given)
    elif given and not takes_images(settings):
        raise no_images("image" if request.queries is None else "images")
    if request.queries is None:
        return [None if request.image is None else AttachedImage(request.image, "image")]
    return [
        None if text is None else AttachedImage(text, f"images.{index}")
        for index, text in enumerate(request.images or [None] * len(request.queries))
    ]


# What a request with effort `videos` may say.
_OF_VIDEOS = frozenset({"query", "image", "model", "effort", "budget"})


def _budget(request: OptimizeRequest, settings: Serve) -> int | None:
    """The videos that a request may cost; None where it asks for none. Raises ApiError (422)."""
    if request.effort != "videos":
        if request.budget is not None:
            raise ApiError(422, "budget has no effect without effort: videos", "budget")
        return None
    refine = settings.videos.refine if settings.videos is not None else None
    if refine is None:
        message = "effort videos: this endpoint makes none for a prompt (serve.videos.refine)"
        raise ApiError(422, message, "effort")
    plain = {"n": 1, "stream": False}
    given = request.model_dump(exclude_defaults=True)
    others = {name for name, value in given.items() if plain.get(name) != value} - _OF_VIDEOS
    if others:
        raise ApiError(422, f"{', '.join(sorted(others))}: no effect with effort: videos", min(others))
    if (budget := request.budget or refine.budget) > refine.budget:
        raise ApiError(422, f"budget is {budget}, at most {refine.budget} is allowed here", "budget")
    return budget


def separate(query: str) -> tuple[str, list[GeneratorFlag]]:
    """A query's text and its generator flags. A query of flags only is left as it is."""
    text, flags = split_flags(query)
    if not text.strip():
        return query, []
    return text, [GeneratorFlag(name=flag.name, value=flag.value) for flag in flags]


def engine_fields(settings: Serve, n: int, seed: int | None, temperature: float | None) -> dict[str, Any]:
    return {
        "model": settings.model_name,
        "n": n,
        "temperature": settings.temperature if temperature is None else temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": seed,
        "stream": False,
    }
