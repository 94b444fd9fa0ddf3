"""The actor pool of each stage, as the recipe describes it: which engine, on how many replicas.

`pipeline` connects these to a stream. Each is a function of the stream so far that adds one pool.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ray.data import Dataset

from vpo_ray.engines.chat import tokenizer
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import ChatModel, Recipe, locate
from vpo_ray.stages.draft import Drafter
from vpo_ray.stages.judge import Judging
from vpo_ray.stages.label import Labeller
from vpo_ray.stages.render import Renderer
from vpo_ray.stages.sample import Sampler
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.stream.actor_pools import Outcome, batch_pool
from vpo_ray.stream.chains import Models, draft_model
from vpo_ray.stream.spending import RunAccount


def sample_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    policy, settings = recipe.policy, recipe.sample
    task_prompt = read_prompt(policy.task_prompt)
    return _vllm_pool(
        stream,
        models.policy,
        settings.engine,
        settings.pool,
        stage=partial(Sampler, settings),
        tokenizer=partial(
            tokenizer.load_tokenizer,
            models.policy,
            task_prompt,
            policy.revision,
            policy.trust_remote_code,
            policy.chat_template_kwargs,
        ),
        outcome=outcome,
        batch_size=rows,
        alone=alone,
        revision=policy.revision,
        trust_remote_code=policy.trust_remote_code,
    )


def judge_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    stage = partial(Judging, recipe.judge)
    return _chat_pool(stream, "judge", recipe.judge, stage, recipe, run, outcome, rows, alone)


def label_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    stage = partial(Labeller, recipe.judge, recipe.queries.unsafe_prompt)
    return _chat_pool(stream, "judge", recipe.judge, stage, recipe, run, outcome, rows, alone)


def draft_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    settings = recipe.draft
    assert settings is not None
    where, llm = draft_model(recipe)
    stage = partial(Drafter, settings, recipe.judge, list(sft_rows(settings.examples, "draft.examples")))
    return _chat_pool(stream, where, llm, stage, recipe, run, outcome, rows, alone)


def _chat_pool(
    stream: Dataset,
    where: str,
    model: ChatModel,
    stage: Callable[[], Any],
    recipe: Recipe,
    run: RunDir,
    outcome: Outcome,
    rows: int,
    alone: bool,
) -> Dataset:
    """A text stage on the backend that the recipe names at `where`."""
    if model.backend != "vllm":
        from vpo_ray.stream.endpoint_pool import endpoint_pool

        return endpoint_pool(
            stream,
            model,
            where=f"{where}.endpoint",
            stage=stage,
            outcome=outcome,
            batch_size=rows,
            run=run.uri,
            # Those of the whole run: a round asks nothing that another one asked.
            answers=model.endpoint.answers or run.root()[0].at("answers"),
            max_cost=recipe.limits.max_cost,
            spent=outcome.spent,
            alone=alone,
        )
    name = locate(model.model)
    return _vllm_pool(
        stream,
        name,
        model.engine,
        model.pool,
        stage=stage,
        tokenizer=partial(
            tokenizer.load_chat_tokenizer,
            name,
            model.revision,
            model.trust_remote_code,
            model.chat_template_kwargs,
        ),
        outcome=outcome,
        batch_size=rows,
        alone=alone,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def _vllm_pool(*args: Any, **kwargs: Any) -> Dataset:
    # Imported where it is used: vLLM takes seconds, and the stages behind it do not need it.
    from vpo_ray.stream.vllm_pool import vllm_pool

    return vllm_pool(*args, **kwargs)


def render_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    settings = recipe.render.located()
    account = _account(recipe, outcome)
    stage = partial(Renderer, settings, recipe.render.store or run.at("videos"), recipe.seed, account)
    # While one video is encoded and stored, the next renders; a service makes as many as it is asked for.
    calls = -(-settings.endpoint.concurrency // rows) if settings.kind == "openai" else 2
    return batch_pool(
        stream, settings.pool, stage=stage, outcome=outcome, batch_size=rows, alone=alone, calls=calls
    )


def _account(recipe: Recipe, outcome: Outcome) -> RunAccount:
    return RunAccount(
        limit=recipe.limits.max_cost, spent=outcome.spent, progress=outcome.progress, stage=outcome.stage
    )


def score_pool(
    stream: Dataset, recipe: Recipe, run: RunDir, models: Models, outcome: Outcome, rows: int, alone: bool
) -> Dataset:
    settings = recipe.reward.located()
    more = {name: reward.located() for name, reward in recipe.more_rewards.items()}
    account = _account(recipe, outcome)
    stage = partial(Scorer, settings, recipe.render.store or run.at("videos"), more, account)
    return batch_pool(stream, settings.pool, stage=stage, outcome=outcome, batch_size=rows, alone=alone)


POOLS = {
    "label": label_pool,
    "draft": draft_pool,
    "sample": sample_pool,
    "judge": judge_pool,
    "render": render_pool,
    "score": score_pool,
}


def block_rows(recipe: Recipe, stage: str) -> int:
    """Rows of a stage's blocks."""
    return {
        "label": recipe.judge.engine.batch_size,
        "draft": draft_model(recipe)[1].engine.batch_size,
        "sample": recipe.sample.engine.batch_size,
        "judge": recipe.judge.engine.batch_size,
        "render": recipe.render.batch_size,
        "score": recipe.reward.batch_size,
    }[stage]
