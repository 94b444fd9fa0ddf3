"""Sample: K candidate prompts per query from the policy.

A candidate's id and seed come from its query, its number k, the policy and the sampling settings,
so that the same recipe asks for the same candidates on any cluster, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.prompts.conditions import Conditions, asked_of
from vpo_ray.prompts.thoughts import UnclosedThought, without_thoughts
from vpo_ray.recipe import Profile, Recipe, Sample, engine_arguments
from vpo_ray.records import Row, candidate_id, failed, seed_of
from vpo_ray.stages.facts import Fact, of_model, of_versions
from vpo_ray.stages.profiles import ProfileCount, profiled
from vpo_ray.stages.spec import Making
from vpo_ray.stages.tally import Tally


def candidates(
    query: Row, settings: Sample, policy: str, seed: int, profiles: Mapping[str, Profile] | None = None
) -> Iterator[Row]:
    """The K rows of one Query row, with everything but the policy's text.

    Args:
        policy: the policy's identity (see `pipeline.policy_id`).
        seed: the recipe's seed.
        profiles: the recipe's, of which the query may have one.
    """
    asked = profiled(query, profiles or {}, seed)
    key = identity_key(settings, seed, asked.get("conditions"))
    for k in range(settings.k):
        identity = candidate_id(query["query_id"], k, policy, key)
        yield {
            "candidate_id": identity,
            "query_id": query["query_id"],
            "query": query["query"],
            "image": query.get("image"),
            "unsafe": query["unsafe"],
            "k": k,
            "seed": seed_of("sample", identity),
            "policy": policy,
            **asked,
        }


def identity_key(settings: Sample, seed: int, conditions: str | None = None) -> dict[str, Any]:
    """What of the settings decides the text of a candidate, for its id.

    Args:
        conditions: of the row, as it has them.
    """
    engine = engine_arguments(settings.engine.engine_kwargs, settings.engine.env)
    told = {"conditions": Conditions.stored(conditions).text()} if conditions else {}
    return {**sampling_key(settings), "seed": seed, **({"engine": engine} if engine else {}), **told}


def sampling_key(settings: Sample) -> dict[str, Any]:
    return settings.model_dump(include={"temperature", "top_p", "top_k", "max_tokens"})


class Sampler:
    """Asks the policy for one candidate; the chat engine folds the task prompt in."""

    name = "sample"

    def __init__(self, settings: Sample) -> None:
        self.settings = settings

    def wants(self, row: Row) -> bool:
        return row["prompt"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        sampling = Sampling(**sampling_key(self.settings), seed=row["seed"])
        conditions = Conditions.stored(row.get("conditions"))
        message = {"role": "user", "content": asked_of(row)}
        answer = await chat.complete([message], sampling, conditions.schema())
        try:
            prompt = without_thoughts(answer.text).strip()
        except UnclosedThought as error:
            return failed(row, self.name, f"UnclosedThought: {error}")
        if not prompt:
            return failed(row, self.name, "the policy's answer is empty")
        prompt = conditions.shaped(prompt)
        return {
            **row,
            "prompt": prompt,
            **({"unmet": conditions.unmet(prompt)} if conditions else {}),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }


def make(making: Making) -> Callable[[], Sampler]:
    return partial(Sampler, making.recipe.sample)


def facts(recipe: Recipe) -> Iterator[Fact]:
    # The task prompt and SFT are in the policy's identity, the base model's weights are not.
    yield from of_versions("vllm")
    yield from of_model("policy.model", recipe.policy.model)


class SampleTally(Tally):
    columns = ("prompt_tokens", "completion_tokens", *ProfileCount.columns)

    def __init__(self) -> None:
        self.prompt = self.completion = 0
        self.profiles = ProfileCount()

    def add(self, row: Row) -> None:
        self.prompt += row["prompt_tokens"] or 0
        self.completion += row["completion_tokens"] or 0
        self.profiles.add(row)

    def result(self) -> dict[str, Any]:
        tokens = {"prompt": self.prompt, "completion": self.completion}
        return {"tokens": tokens, **self.profiles.result()}


tally = SampleTally
