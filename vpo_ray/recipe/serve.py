"""Recipe sections of serving: the endpoint, who may call it, its safety gate, ranking and videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from vpo_ray.recipe.base import (
    NO_OR_YES,
    OFF,
    Fraction,
    Place,
    Pool,
    Positive,
    Section,
    Source,
    Temperature,
    refuse_unused,
)
from vpo_ray.recipe.endpoint import refuse_keys
from vpo_ray.recipe.evaluation import limit_of
from vpo_ray.recipe.evolution import Evolve
from vpo_ray.recipe.formula import Formula
from vpo_ray.recipe.profiles import CaptionFields
from vpo_ray.recipe.text import Engine, Images, Judge, TemplateArguments
from vpo_ray.recipe.video import Endpoint, Render, Reward

Seconds = Annotated[float, Field(gt=0)]

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._*-]+|\[[0-9a-f:.]+\])(?::([0-9]+|\*))?")
_PORTS = {"http": "80", "https": "443"}


def normal_origin(origin: str) -> str:
    """An origin as browsers send it: in lower case, without a slash at its end or the usual port.

    Raises:
        ValueError: neither an origin, nor `null` (pages without one, such as files), nor `*`.
    """
    text = origin.strip().lower().removesuffix("/")
    if text in ("*", "null"):
        return text
    if not (found := _ORIGIN.fullmatch(text)):
        raise ValueError(
            f"{origin!r} is no origin: give scheme, host and port alone, such as https://ui.example:8443"
        )
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _PORTS.get(scheme) else "")


Origin = Annotated[str, AfterValidator(normal_origin)]


def _limit(text: str) -> str:
    limit_of(text)
    return text


LimitText = Annotated[str, AfterValidator(_limit)]


# Keys of an endpoint that do nothing while serving: no run pays, and nothing is kept.
_OF_RUNS = ("prompt_price", "completion_price", "answers", "logprobs")
# And those that a question of a chat alone has.
_OF_CHATS = ("azure_api_version", "structured", "tokens_per_minute")


class Service(Section):
    """A model behind an OpenAI-compatible endpoint that the ingress asks; its `timeout_s` is 10 and its
    `retries` 1 unless they are given."""

    model: str
    endpoint: Endpoint = Endpoint(timeout_s=10, retries=1)
    chat_template_kwargs: TemplateArguments = {}
    images: Images = Field("show", description="of requests; ignore: it reads the text alone")

    @model_validator(mode="before")
    @classmethod
    def _answers_soon(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("endpoint"), Mapping):
            return {**given, "endpoint": {"timeout_s": 10, "retries": 1, **given["endpoint"]}}
        return given

    @model_validator(mode="after")
    def _obeys(self) -> Service:
        refuse_keys(self.endpoint, _OF_RUNS, "while serving")
        return self


def _no_chat(service: Service | None, what: str) -> None:
    if service is not None:
        refuse_keys(service.endpoint, _OF_CHATS, what)
        if service.chat_template_kwargs:
            raise ValueError(f"chat_template_kwargs does nothing for {what}: leave it out")


class Safety(Section):
    """The safety gate. What is checked: the user's query, the optimised prompt, or both.

    `query: rewrite` lets a flagged query through to the optimiser, whose task is to make it
    harmless, and relies on the check of the prompt. Every checker that is named is asked, in the
    order below, until one flags the text.
    """

    query: Annotated[Literal["off", "refuse", "rewrite"], OFF] = "off"
    prompt: bool = False
    keywords: Source | None = Field(
        default=None, description="file with a word or phrase a line; # begins a comment"
    )
    moderation: Service | None = Field(default=None, description="an endpoint with OpenAI's /v1/moderations")
    judge: Service | None = Field(default=None, description="a chat endpoint that is asked for a verdict")
    judge_prompt: Source = "builtin:safety"
    on_error: Literal["refuse", "pass"] = "refuse"

    @model_validator(mode="after")
    def _has_a_checker(self) -> Safety:
        _no_chat(self.moderation, "moderation")
        checks = self.query != "off" or self.prompt
        if checks and not (self.keywords or self.moderation or self.judge):
            raise ValueError("nothing to check with: name `keywords`, `moderation` or `judge`")
        if self.query == "rewrite" and not self.prompt:
            raise ValueError("query: rewrite needs prompt: true, or a flagged query would go unchecked")
        if not checks:
            refuse_unused(
                self, "keywords moderation judge", "while query is off and prompt false: say what to check"
            )
        if self.judge is None:
            refuse_unused(self, "judge_prompt", "without judge")
        if self.judge is None and self.moderation is None:
            refuse_unused(self, "on_error", "without moderation or judge: keywords do not fail")
        return self


class BestOf(Section):
    """Rank n candidates and answer with the best. `judge` is a chat endpoint that gives each a score
    and a critique; `rerank` a text reward behind a `/rerank` route (vLLM's, Jina's, Cohere's). With both,
    `formula` weighs the two, as a recipe's formula weighs rewards; its terms are `judge` and `rerank`."""

    n: Annotated[int, Field(ge=2, le=64)] = 4
    judge: Service | None = None
    judge_prompt: Source = "builtin:rank"
    rerank: Service | None = None
    formula: Formula | None = None

    @model_validator(mode="after")
    def _has_rankers(self) -> BestOf:
        _no_chat(self.rerank, "rerank")
        if self.rerank is not None:
            refuse_unused(self.rerank, "images", "for rerank, which reads text alone")
        asked = [name for name in ("judge", "rerank") if getattr(self, name) is not None]
        if not asked or (len(asked) == 2 and self.formula is None):
            raise ValueError("name what ranks: either `judge` or `rerank`, or both with a `formula`")
        for name in self.formula.names() if self.formula is not None else ():
            if name.removesuffix(".score") not in asked:
                raise ValueError(f"formula: no {name!r} ranks here ({', '.join(asked)})")
        if self.judge is None:
            refuse_unused(self, "judge_prompt", "without judge")
        return self


class Autoscaling(Section):
    """How the engine's replicas follow the load between `pool.size`'s two numbers."""

    target_ongoing_requests: Positive | None = Field(
        default=None, description="requests a replica works on; half of engine.max_num_seqs when unset"
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600


class Canary(Section):
    """A second checkpoint that answers a share of the queries."""

    checkpoint: Source
    share: Fraction


class Refine(Section):
    """`"effort": "videos"` of `/v1/optimize`: prompts of one query, evolved as a job, as `vpo refine` does.

    What is unset is the recipe's own; without a section `evolve` its defaults hold. The LLMs that write and
    judge are asked over HTTP: `backend: openai`.
    """

    budget: Annotated[int, Field(ge=2)] = Field(
        default=8, description="videos of a query, its own among them; a request may ask for fewer"
    )
    max_waiting: Positive = Field(default=16, description="jobs; more are refused")
    evolve: Evolve | None = Field(default=None, description="the recipe's when unset")
    judge: Judge | None = Field(default=None, description="the recipe's when unset")
    more_rewards: dict[str, Reward] | None = Field(default=None, description="the recipe's when unset")

    @model_validator(mode="after")
    def _judges_only(self) -> Refine:
        if self.judge is not None:
            refuse_unused(
                self.judge, "refine_prompt", "in serve.videos.refine, whose judge gives verdicts only"
            )
        return self


class Videos(Section):
    """`/v1/videos`: query in, video out. `render` and `reward` are the recipe's own when unset."""

    store: Place = Field(description="folder or URI of the video store; jobs are in its `jobs/`")
    render: Render | None = None
    reward: Reward | None = None
    score: bool = Field(default=False, description="let the reward model score every video")
    max_waiting: Positive = 64
    refine: Refine | None = Field(
        default=None, description="let a request's effort be videos: the best prompt that a budget finds"
    )

    @model_validator(mode="after")
    def _rendered_in_full(self) -> Videos:
        if self.render is not None:
            refuse_unused(self.render, "preview", "in serve.videos, which are all rendered in full")
        return self


class Feedback(Section):
    """Answers and what users say of them (`/v1/feedback`), kept in a store, for `vpo collect`.

    Only of keys whose line in the file of keys says `feedback=yes`: their owner allows it. `anyone` is for an
    endpoint without keys, whose users have to be told by other means.
    """

    store: Place = Field(description="folder or URI of the tables `answers` and `opinions`, and of `images/`")
    queries: Literal["plain", "hash"] = Field(
        default="plain", description="keep the text of queries, or a hash alone, of which nothing is learnt"
    )
    images: bool = Field(
        default=False, description="keep the images of queries too; else of each a hash alone"
    )
    secret_env: str = Field(
        default="VPO_FEEDBACK_SECRET",
        description="environment variable with the secret that answers' ids take",
    )
    anyone: bool = False
    notice: str = Field(default="", description="what the page at / tells its users of it")

    @model_validator(mode="after")
    def _keeps_images_with_words(self) -> Feedback:
        if self.queries == "hash":
            refuse_unused(self, "images", "with queries: hash, which keeps nothing to learn from")
        return self


class Require(Section):
    """An evaluation of the checkpoint that has to pass before `vpo deploy` deploys it."""

    results: Place = Field(description="path or URI of the results.json of an evaluation")
    fail_below: list[LimitText] = Field(min_length=1, description="as --fail-below of `vpo evaluate`")


class Serve(Section):
    """The endpoint of the trained policy."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str = "vpo"
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    max_query_chars: Positive = 4000
    max_n: Positive = 8
    max_messages: Positive = 64
    max_queries: Positive = Field(default=16, description="queries of one /v1/optimize request")
    tell_wishes: bool | None = Field(
        default=None,
        description="tell the policy of a request's wishes; unset: where it learnt profiles in training",
    )
    caption_fields: CaptionFields | None = Field(
        default=None, description="of a request's format: json; those of the profiles when unset"
    )
    images: Images | None = Field(
        default=None,
        description="of requests; unset: shown to a policy that sees, unless policy.images is ignore",
    )
    history: Literal["edits", "last", "refuse"] = Field(
        default="edits",
        description="earlier user messages: the later ones edit the first, only the last counts, or 400",
    )
    timeout_s: Seconds = Field(default=120, description="the longest answer; draining waits as long")
    retries: Annotated[int, Field(ge=0)] = Field(default=2, description="when a replica dies under a request")
    fallback: bool = Field(default=False, description="answer with the raw query where the optimiser fails")
    keys: Source | None = Field(
        default=None, description="file or folder (a mounted Secret) that `vpo key` writes for"
    )
    requests_per_minute: Positive | None = Field(
        default=None, description="prompts a minute (queries x candidates) of each key without own limit"
    )
    concurrency: Positive | None = Field(
        default=None, description="prompts at once of each key without own limit"
    )
    max_queued_requests: Positive = 1024
    overload_status: Literal[429, 503] = 429
    cors_origins: list[Origin] = Field(
        default=[], description="pages of other sites that may call; * for all, or for a part of a host"
    )
    log_queries: Annotated[Literal["no", "hash", "yes"], NO_OR_YES] = "no"
    playground: bool = True
    example: bool = Field(default=True, description="`vpo run` ends with an answer to one of its queries")
    compare: Source | None = Field(
        default=None, description="folder of `vpo compare page`, shown to anyone at /compare/"
    )
    ingress_replicas: Positive = 1
    safety: Safety = Safety()
    best_of: BestOf | None = None
    autoscaling: Autoscaling = Autoscaling()
    canary: Canary | None = None
    videos: Videos | None = None
    feedback: Feedback | None = None
    require: Require | None = None
    engine: Engine = Engine()
    pool: Pool = Pool()

    @model_validator(mode="after")
    def _knows_whose_feedback(self) -> Serve:
        if self.feedback is not None and self.keys is None and not self.feedback.anyone:
            raise ValueError(
                "feedback: without serve.keys nobody can allow it: name keys, or set feedback.anyone: true"
            )
        if self.feedback is not None and self.keys is not None:
            refuse_unused(self.feedback, "anyone", "with serve.keys, whose lines say feedback=yes")
        return self

    @model_validator(mode="after")
    def _all_used(self) -> Serve:
        if self.pool.size[0] == self.pool.size[1]:
            refuse_unused(self, "autoscaling", "with as many replicas at most as at least: see pool.size")
        return self
