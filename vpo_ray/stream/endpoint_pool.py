"""The pool of a text stage whose LLM is an OpenAI-compatible endpoint, or another's engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pyarrow as pa

from vpo_ray.engines.chat import ChatStage, build
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint.client import EndpointClient
from vpo_ray.lifetime import bind_worker
from vpo_ray.stream.actor_pools import RESTARTS, ChatRunner, Outcome, of_stage
from vpo_ray.stream.passes import EndpointModel, Replicas


class EndpointActor:
    """One replica of a text stage: on an endpoint it holds no model, only requests under way."""

    def __init__(self, asked: EndpointModel, stage: Callable[[], ChatStage], outcome: Outcome) -> None:
        bind_worker()  # one that nobody waits for would go on paying
        model, account = asked.model, asked.account
        if model.is_plugin:
            self.run = ChatRunner(stage(), build(model), outcome, images=asked.images)
            return
        client = EndpointClient(model.endpoint, model.model, asked.where, account)
        chat = OpenAIChat(model, client, Answers(asked.answers, asked.run), account)
        self.run = ChatRunner(stage(), chat, outcome, images=asked.images)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        yield await self.run(batch)


def endpoint_pool(
    dataset: Any, stage: Callable[[], ChatStage], outcome: Outcome, replicas: Replicas, asked: EndpointModel
) -> Any:
    """Run a text stage over a dataset on replicas that ask an endpoint, or have another's engine."""
    from ray.data import ActorPoolStrategy

    pool = replicas.pool
    # Batches enough to keep every slot of the endpoint taken, and one that waits.
    batches = -(-asked.model.endpoint.concurrency // replicas.batch_size) + 1
    if asked.model.is_plugin:
        batches = asked.model.engine.max_concurrent_batches
    batches = 1 if replicas.one_at_a_time else batches
    return dataset.map_batches(
        of_stage(EndpointActor, outcome.stage),
        fn_constructor_kwargs={"asked": asked, "stage": stage, "outcome": outcome},
        batch_size=replicas.batch_size,
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
