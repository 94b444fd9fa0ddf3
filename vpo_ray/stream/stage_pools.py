"""The actor pool of a stage, as its entry in `stages.spec` and the recipe describe it: which engine, on how
many replicas. `pipeline` adds one for each stage to its stream."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ray.data import Dataset

from vpo_ray.engines.chat import tokenizer
from vpo_ray.engines.chat.images import TOLD, ShownImages
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import ChatModel, locate
from vpo_ray.recipe.text import Images
from vpo_ray.stages.spec import Making, StageSpec, asks_with_query
from vpo_ray.storage.images import images_of
from vpo_ray.stream.actor_pools import Outcome, batch_pool
from vpo_ray.stream.passes import EndpointModel, Pass, VllmModel
from vpo_ray.stream.spending import RunAccount


def add_pool(stream: Dataset, spec: StageSpec, this: Pass, outcome: Outcome) -> Dataset:
    """The stream behind one more stage."""
    recipe, replicas = this.recipe, this.replicas(spec)
    account = RunAccount(
        limit=recipe.limits.max_cost,
        spent=outcome.spent,
        answers=this.run.root()[0].at("answers"),
        progress=outcome.progress,
        stage=spec.name,
    )
    make = spec.make(Making(recipe, this.store, account, images_of(this.run).folder.uri))
    if spec.runs_on == "batch":
        return batch_pool(
            stream,
            replicas.pool,
            stage=make,
            outcome=outcome,
            batch_size=replicas.batch_size,
            one_at_a_time=replicas.one_at_a_time,
            calls=spec.calls(recipe),
        )
    if spec.runs_on == "policy":
        shown = _shown(this, recipe.policy.images, "")
        return _vllm_pool(stream, make, outcome, replicas, replace(_policy(this), images=shown))
    model: ChatModel = spec.of(recipe)
    # An endpoint that is asked with the query alone is a policy as ours is.
    alone = spec.name == "rewrite" and asks_with_query(recipe)
    shown = _shown(this, model.images, "" if alone else TOLD)
    if model.backend != "vllm":
        from vpo_ray.stream.endpoint_pool import endpoint_pool

        # Answers of the whole run: a round asks nothing that another one asked.
        answers = model.endpoint.answers or this.run.root()[0].at("answers")
        asked = EndpointModel(model, f"{spec.key(recipe)}.endpoint", this.run.uri, answers, account, shown)
        return endpoint_pool(stream, make, outcome, replicas, asked)
    return _vllm_pool(stream, make, outcome, replicas, replace(_chat_model(model), images=shown))


def _shown(this: Pass, images: Images, told: str) -> ShownImages | None:
    """The images that a model is shown, of the rows that have one."""
    if images == "ignore":
        return None
    return ShownImages(images_of(this.run).folder.uri, told)


def _policy(this: Pass) -> VllmModel:
    policy, name = this.recipe.policy, this.models.policy
    task_prompt = read_prompt(policy.task_prompt)
    load = partial(
        tokenizer.load_tokenizer,
        name,
        task_prompt,
        policy.revision,
        policy.trust_remote_code,
        policy.chat_template_kwargs,
    )
    return VllmModel(name, this.recipe.sample.engine, load, policy.revision, policy.trust_remote_code)


def _chat_model(model: ChatModel) -> VllmModel:
    name = locate(model.model)
    load = partial(
        tokenizer.load_chat_tokenizer,
        name,
        model.revision,
        model.trust_remote_code,
        model.chat_template_kwargs,
    )
    return VllmModel(name, model.engine, load, model.revision, model.trust_remote_code)


def _vllm_pool(*arguments: Any) -> Dataset:
    # Imported where it is used: vLLM takes seconds, and the stages behind it do not need it.
    from vpo_ray.stream.vllm_pool import vllm_pool

    return vllm_pool(*arguments)
