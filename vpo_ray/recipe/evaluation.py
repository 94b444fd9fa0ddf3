"""Recipe section of `vpo evaluate`: which policies are compared, on which queries, and by what."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from vpo_ray.recipe.base import Fraction, Positive, Section, Source, Temperature, refuse_unused
from vpo_ray.recipe.text import ChatModel, Judge
from vpo_ray.recipe.video import Render, Reward

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LIMIT = re.compile(r"(?:([^/=]+)/([^/=]+)/)?([^/=]+)=([^/=]+)")
# What policies are called where a recipe names none: see `evaluation.policies.default_policies`.
_DEFAULT_NAME = re.compile(r"query|base|sft|(dpo|rl)(_\d+)?")
PolicyKind = Literal["query", "base", "few_shot", "sft", "dpo", "rl", "checkpoint", "endpoint", "file"]


class Limit(NamedTuple):
    """The least that a metric may be, or the most where lower is better."""

    set: str | None  # every set where None
    policy: str | None
    metric: str
    value: float


def limit_of(text: str) -> Limit:
    """From `METRIC=VALUE` or `SET/POLICY/METRIC=VALUE`; `alignment.aligned` is `verdict.aligned`.

    Raises ValueError."""
    found = _LIMIT.fullmatch(text.strip())
    try:
        value = float(found[4]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise ValueError(f"{text!r} is no limit: give METRIC=VALUE or SET/POLICY/METRIC=VALUE")
    metric = re.sub(r"^alignment\.", "verdict.", found[3].strip())
    return Limit(found[1], found[2], metric, value)


class EvaluatedPolicy(Section):
    """What makes a prompt of a query.

    query: the user's words as they are. base: `policy.model` with the task prompt. few_shot: an LLM that is
    shown examples (`llm`, the judge's model when unset). sft, dpo, rl: what the run trained; `round` names
    a later round's. checkpoint: a folder or URI at `path`. endpoint: `llm`, which is sent the query alone, or
    `prompt` with the query in it. file: prompts made elsewhere, rows with `query` and `prompt` at `path`.
    `times` applies a policy to its own output (VPO, table 6).
    """

    kind: PolicyKind
    path: Source | None = None
    round: Annotated[int, Field(ge=2)] | None = None
    llm: ChatModel | None = None
    prompt: Source | None = Field(None, description="template with a slot {query}; few_shot also {examples}")
    examples: Source | None = Field(
        None, description="rows with `query` and `prompt`; draft.examples when unset"
    )
    shots: Positive = 3
    temperature: Temperature = 0.0
    max_tokens: Positive = 1024
    times: Positive = 1

    @model_validator(mode="after")
    def _has_what_it_uses(self) -> EvaluatedPolicy:
        if (self.path is None) == (self.kind in ("checkpoint", "file")):
            raise ValueError(f"a policy of kind {self.kind} {'has no' if self.path else 'needs a'} path")
        if self.kind == "endpoint" and self.llm is None:
            raise ValueError("a policy of kind endpoint needs an llm")
        if self.kind not in ("few_shot", "endpoint"):
            refuse_unused(self, "llm prompt temperature max_tokens", f"with kind: {self.kind}")
        if self.kind != "few_shot":
            refuse_unused(self, "examples shots", f"with kind: {self.kind}")
        if self.kind not in ("dpo", "rl"):
            refuse_unused(self, "round", f"with kind: {self.kind}")
        if self.kind in ("query", "file"):
            refuse_unused(self, "times", f"with kind: {self.kind}: it cannot be asked again")
        return self


class EvaluatedSet(Section):
    """Queries to evaluate on: the run's eval split, a file as `queries.path` takes it, or a benchmark's
    published files, read where the recipe says they are.

    `size` takes that many, chosen by their content and in proportion to the set's own categories.
    """

    kind: Literal["eval_split", "file", "vbench", "monetbench", "t2vsafetybench"] = "file"
    path: Source | None = None
    column: str = "query"
    category: Annotated[str | None, Field(description="column of a file with the category of each query")] = (
        None
    )
    image_column: Annotated[str | None, Field(description="of a file, as queries.image_column")] = None
    size: Positive | None = None

    @model_validator(mode="after")
    def _has_a_path(self) -> EvaluatedSet:
        if (self.path is None) != (self.kind == "eval_split"):
            raise ValueError(f"a set of kind {self.kind} {'has no' if self.path else 'needs a'} path")
        if self.kind != "file":
            refuse_unused(self, "column category image_column", f"with kind: {self.kind}")
        return self


class Preference(Section):
    """An LLM that is shown what two policies made of one query, in both orders.

    It says which it prefers; where it changes its mind with the order, the two tie. Videos are shown to a
    model behind an endpoint (`backend: openai`), as frames.
    """

    llm: ChatModel
    question: Source | None = Field(None, description="template; the package's when unset")
    max_tokens: Positive = 1024
    frames: Positive = Field(8, description="of each video that are shown, where videos are compared")
    against: str | None = Field(
        None, min_length=1, description="policy that the others are compared with; all pairs if unset"
    )


def _by_kind(given: Any) -> Any:
    """`[query, dpo]` is short for policies of these kinds under their names."""
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return {item: {"kind": item} for item in given}
    return given


class Evaluation(Section):
    """`vpo evaluate`: policies side by side on the same queries, each with the same video seeds.

    Every prompt is judged, rendered and scored, whatever the judge says of it; unsafe ones are rendered only
    with `render_unsafe`. What has no video counts as the worst.
    """

    policies: Annotated[
        dict[str, EvaluatedPolicy],
        BeforeValidator(_by_kind, json_schema_input_type=dict[str, EvaluatedPolicy] | list[PolicyKind]),
    ] = {}
    sets: dict[str, EvaluatedSet] = {"eval": EvaluatedSet(kind="eval_split")}
    seeds: Positive = Field(1, description="videos of a query, each with another seed")
    videos: bool = Field(True, description="render and score; without, prompts alone are evaluated")
    render_unsafe: bool = False
    profile: str | None = Field(
        None, description="of `profiles`: policies that write are asked under it, whatever its share"
    )
    judge: Judge | None = Field(None, description="the training's judge when unset, which the report marks")
    rewards: dict[str, Reward] = Field({}, description="measures of videos beside the training's rewards")
    transfer: dict[str, Render] = Field({}, description="further video models, by name")
    prefer_prompts: Preference | None = None
    prefer_videos: Preference | None = None
    required_words: Source | None = Field(
        None, description="words that a prompt keeps where its query has them, one a line"
    )
    unsafe_words: Source | None = Field(None, description="words that no prompt may have, one a line")
    guard: ChatModel | None = Field(None, description="a classifier that is asked whether a prompt is unsafe")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=1000)] = 10_000
    similar: Fraction = Field(0.0, description="smallest difference of scores that is a win")

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        named: Mapping[str, Mapping[str, Any]] = {
            "policies": self.policies,
            "sets": self.sets,
            "transfer": self.transfer,
            "rewards": self.rewards,
        }
        for key, entries in named.items():
            for name in entries:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{key}: {name!r} is no name: use letters, digits, - _ and .")
        for render in self.transfer.values():
            refuse_unused(render, "preview strategy", "in transfer, whose videos are all rendered in full")
        if self.judge is not None:
            unused = "refine_prompt prompt_max_chars word_limit"
            refuse_unused(self.judge, unused, "in evaluate.judge, which gives verdicts and writes nothing")
        if not self.sets:
            raise ValueError("sets: name at least one")
        if not self.videos:
            refuse_unused(self, "transfer rewards prefer_videos render_unsafe seeds", "with videos: false")
        for key, against in self.bases().items():
            if against not in self.policies and (self.policies or not _DEFAULT_NAME.fullmatch(against)):
                known = ", ".join(self.policies or ("query", "base", "sft", "dpo", "rl"))
                raise ValueError(f"{key}.against: no policy {against!r}, but {known}")
        if self.prefer_prompts is not None:
            refuse_unused(self.prefer_prompts, "frames", "in prefer_prompts")
        if self.prefer_videos is not None and self.prefer_videos.llm.backend != "openai":
            raise ValueError(
                f"prefer_videos.llm.backend: {self.prefer_videos.llm.backend} is sent no frames; write "
                "openai, with the `endpoint` of a vision-language model"
            )
        return self

    def bases(self) -> dict[str, str]:
        """The policies that others are compared with, by the key that names them."""
        preferences = {"prefer_prompts": self.prefer_prompts, "prefer_videos": self.prefer_videos}
        return {key: of.against for key, of in preferences.items() if of is not None and of.against}

    def llms(self) -> list[ChatModel]:
        """The LLMs that it asks, beside those of the run."""
        asked = [self.judge, self.guard, *(policy.llm for policy in self.policies.values())]
        asked += [choice.llm for choice in (self.prefer_prompts, self.prefer_videos) if choice is not None]
        return [llm for llm in asked if llm is not None]
