"""The pool of a text stage whose LLM is an OpenAI-compatible endpoint, or another's engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pyarrow as pa

from vpo_ray.engines.chat import ChatStage, build
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint.client import EndpointClient
from vpo_ray.lifetime import bind_worker
from vpo_ray.recipe import ChatModel
from vpo_ray.stream.actor_pools import RESTARTS, ChatRunner, Outcome, of_stage
from vpo_ray.stream.spending import RunAccount


class EndpointActor:
    """One replica of a text stage: on an endpoint it holds no model, only requests under way."""

    def __init__(
        self,
        model: ChatModel,
        where: str,
        stage: Callable[[], ChatStage],
        outcome: Outcome,
        run: str,
        answers: str,
        max_cost: float | None,
        spent: float,
    ) -> None:
        bind_worker()  # one that nobody waits for would go on paying
        if model.is_plugin:
            self.run = ChatRunner(stage(), build(model), outcome)
            return
        account = RunAccount(limit=max_cost, spent=spent, progress=outcome.progress, stage=outcome.stage)
        client = EndpointClient(model.endpoint, model.model, where, account)
        chat = OpenAIChat(model, client, Answers(answers, run), account)
        self.run = ChatRunner(stage(), chat, outcome)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        yield await self.run(batch)


def endpoint_pool(
    dataset: Any,
    model: ChatModel,
    *,
    where: str,
    stage: Callable[[], ChatStage],
    outcome: Outcome,
    batch_size: int,
    run: str,
    answers: str,
    max_cost: float | None,
    spent: float,
    alone: bool = False,
) -> Any:
    """Run a text stage over a dataset on replicas that ask an endpoint, or have another's engine.

    Args:
        where: the recipe's key of the endpoint, for messages.
        run: URI of the run directory, which pays.
        answers: URI of the folder of kept answers.
        spent: what the run had paid before.
    """
    from ray.data import ActorPoolStrategy

    pool = model.pool
    # Batches enough to keep every slot of the endpoint taken, and one that waits.
    batches = 1 if alone else -(-model.endpoint.concurrency // batch_size) + 1
    if model.is_plugin and not alone:
        batches = model.engine.max_concurrent_batches
    return dataset.map_batches(
        of_stage(EndpointActor, outcome.stage),
        fn_constructor_kwargs={
            "model": model,
            "where": where,
            "stage": stage,
            "outcome": outcome,
            "run": run,
            "answers": answers,
            "max_cost": max_cost,
            "spent": spent,
        },
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=pool.size[0], max_size=pool.size[1], max_tasks_in_flight_per_actor=batches
        ),
        max_concurrency=batches,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        accelerator_type=pool.accelerator_type,
        resources=pool.resources or None,
        label_selector=pool.labels or None,
        **RESTARTS,
    )
