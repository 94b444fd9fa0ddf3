"""The pool of a text stage on vLLM: `ray.data.llm`'s own actor pool, driven row by row.

`ray.data.llm` brings the engine, its placement (tensor parallel, accelerator types), LoRA, metrics
and the restart of an actor whose engine died. Its batch function gives one answer a row; ours runs
a text stage on each row, with as many turns as the row needs, all rows of all batches at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vpo_ray.engines.chat import ChatStage
from vpo_ray.engines.chat.adapter import Adapter, adapter_of
from vpo_ray.engines.chat.cpu_memory import cpu_cache
from vpo_ray.engines.chat.images import ShownImages
from vpo_ray.engines.chat.vllm_chat import VllmChat
from vpo_ray.lifetime import bind_worker
from vpo_ray.storage.model_cache import fetch, fetch_for_engine
from vpo_ray.stream.actor_pools import RESTARTS, ChatRunner, Outcome, of_stage
from vpo_ray.stream.passes import Replicas, VllmModel
from vpo_ray.stream.ray_compat import VLLM_FATAL_ERRORS, VllmBatchActor

logger = logging.getLogger(__name__)


class VllmStageActor(VllmBatchActor):
    """One replica of a text stage: an engine, and the stage that runs rows on it."""

    def __init__(
        self,
        *args: Any,
        stage: Callable[[], ChatStage],
        tokenizer: Callable[[], Any],
        outcome: Outcome,
        adapter: Adapter | None = None,
        images: ShownImages | None = None,
        model: str,
        **kwargs: Any,
    ) -> None:
        bind_worker()  # the engine's core is a process that would outlive this one
        if adapter is not None:
            adapter = adapter.on_node()
        kwargs["engine_kwargs"] = {**kwargs["engine_kwargs"], **cpu_cache(kwargs["engine_kwargs"])}
        super().__init__(*args, model=fetch_for_engine(model), **kwargs)
        chat = VllmChat(self.llm, tokenizer(), adapter)
        self.run = ChatRunner(stage(), chat, outcome, VLLM_FATAL_ERRORS, _leave, images)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        yield await self.run(batch)


@contextmanager
def _as_before() -> Iterator[None]:
    """`build_processor` calls `ray.init` once more, which takes SIGTERM and the log level of Ray for
    itself: a job that is stopped would end without its ledger."""
    handler, ray_logger = signal.getsignal(signal.SIGTERM), logging.getLogger("ray")
    level = ray_logger.level
    try:
        yield
    finally:
        ray_logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _leave() -> None:
    """The engine's process is gone: leave, so that Ray restarts this actor with a fresh one and
    takes the batch again. A raised error would come back to this same actor."""
    logger.exception("the vLLM engine died, leaving for a restart")
    os._exit(1)


def vllm_pool(
    dataset: Any, stage: Callable[[], ChatStage], outcome: Outcome, replicas: Replicas, model: VllmModel
) -> Any:
    """Run a text stage over a dataset of FEEDBACK rows on a pool of vLLM engines.

    Args:
        stage: made once in every replica.
        outcome: where rows go and how they are counted.
    """
    adapter, engine, pool = adapter_of(model.name), model.engine, replicas.pool
    base = model.name if adapter is None else adapter.base
    bundle: dict[str, float] = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "trust_remote_code": model.trust_remote_code,
        "enable_prefix_caching": True,
        # A model that may put white space between JSON tokens may never stop doing so.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "revision": model.revision,
        "max_model_len": engine.max_model_len,
        **engine.executor(),
        **(adapter.engine_kwargs() if adapter is not None else {}),
        **engine.engine_kwargs,
    }
    config = vLLMEngineProcessorConfig(
        # Ray reads the configuration here; each replica fetches the weights to its own node.
        model_source=fetch(base, weights=False),
        engine_kwargs={key: value for key, value in kwargs.items() if value is not None},
        concurrency=pool.size,
        batch_size=replicas.batch_size,
        max_concurrent_batches=1 if replicas.one_at_a_time else engine.max_concurrent_batches,
        max_tasks_in_flight_per_actor=1 if replicas.one_at_a_time else None,
        accelerator_type=pool.accelerator_type,
        placement_group_config={"bundle_per_worker": {k: v for k, v in bundle.items() if v}},
        runtime_env={"env_vars": {"VLLM_LOGGING_LEVEL": "WARNING", **engine.env}},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    with _as_before():
        processor = build_processor(config)
    engine_stage = processor.get_stage_by_name("vLLMEngineStage")
    arguments = engine_stage.get_dataset_map_batches_kwargs(replicas.batch_size, "")
    arguments["fn_constructor_kwargs"] |= {
        "model": base,
        "stage": stage,
        "tokenizer": model.tokenizer,
        "outcome": outcome,
        "adapter": adapter,
        "images": model.images,
    }
    if pool.labels:
        arguments["label_selector"] = pool.labels
    actor = of_stage(VllmStageActor, outcome.stage)
    return dataset.map_batches(actor, batch_format="pyarrow", **(arguments | RESTARTS))
