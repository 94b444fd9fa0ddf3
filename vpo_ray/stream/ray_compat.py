"""The private parts of Ray that the package uses: no other module of it touches them.

What has a public counterpart is used where it is needed. What has none is here, with what to do when a
release of Ray changes it; `missing` says which are gone, and so does the error of whatever needs one.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# `module:attribute` of every private part, and what to do when it is gone. An attribute that only
# instances have is looked for in the source of their class.
ADVICE = {
    "ray.data._internal.logical.interfaces:LogicalPlan": "build the plan that Dataset.repartition builds",
    "ray.data._internal.logical.operators:StreamingRepartition": "use Dataset.repartition, if by then it "
    "takes less than a CPU for each task",
    "ray.data:Dataset._logical_plan": "look at how Dataset.repartition gets its plan",
    "ray.data:Dataset._from_parent": "look at how Dataset.repartition makes its dataset",
    "ray.data._internal.execution.streaming_executor:StreamingExecutor._resource_manager": "leave Sparing "
    "out if `driver_alone` of benchmarks/scale.py is no worse without it",
    "ray.data._internal.execution.resource_manager:ResourceManager.update_usages": "leave Sparing out if "
    "`driver_alone` of benchmarks/scale.py is no worse without it",
    "ray.llm._internal.batch.stages.vllm_engine_stage:vLLMEngineStageUDF": "find the class that "
    "ray.data.llm's vLLM processor gives to map_batches: its __init__ makes `llm`",
    "ray.llm._internal.batch.stages.vllm_engine_stage:_VLLM_FATAL_ERRORS": "name vLLM's EngineDeadError and "
    "EngineGenerateError here",
    "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine": "find the engine that LLMServer starts",
    "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine._start_async_llm_engine": "do without "
    "OwnExecutorEngine if Ray has stopped replacing `distributed_executor_backend` on a CPU",
    "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine._engine_client": "find vLLM's AsyncLLM in "
    "the engine: its `errored` says that it died",
    "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine._oai_serving_chat": "find vLLM's "
    "OpenAIServingChat in the engine: it puts `system_fingerprint` into answers",
    "ray.llm._internal.serve.core.configs.openai_api_models:ChatCompletionRequest": "find the class that "
    "LLMServer.chat takes",
    "ray.llm._internal.common.callbacks.base:CallbackCtx.run_init_node": "leave skip_download out: replicas "
    "start some seconds later",
    "ray.serve.llm:LLMConfig._engine_config": "find where the engine's configuration is kept after it is "
    "made once: model_source must be read again after it is set",
    "ray.serve.llm:LLMServer._default_engine_cls": "find how a server chooses its engine's class",
    "ray.serve.llm:LLMServer._llm_config": "find how a server keeps what it was given",
    "ray.serve.context:_get_global_client": "use what `serve deploy` uses, the dashboard's REST API",
    "ray._private.internal_api:get_memory_info_reply": "see how `ray memory --stats-only` sums up spilling",
    "ray._private.state:state": "see what `ray memory` passes to get_memory_info_reply",
    "ray._private.worker:global_worker.gcs_client": "see how `ray status` reaches the GCS",
    "ray._private.worker:global_worker.node": "find the folder of the logs of this session: /tmp/ray/*/logs",
    "ray.core.generated.autoscaler_pb2:GetClusterStatusReply": "see how `ray status` reads the reply",
    "ray.experimental.internal_kv:_internal_kv_get": "see where `ray status` finds the autoscaler's report",
    "ray._private.ray_constants:RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "see what runtime_env packaging obeys",
    "ray._private.ray_constants:get_runtime_env_default_excludes": "see what runtime_env packaging excludes",
    "ray._private.runtime_env.packaging:GCS_STORAGE_MAX_SIZE": "find the largest package that Ray uploads",
    "ray._private.runtime_env.packaging:_get_excludes": "see how runtime_env packaging reads `excludes`",
    "ray._private.runtime_env.packaging:get_excludes_from_ignore_files": "see how runtime_env packaging "
    "reads .gitignore and .rayignore",
}


class RayChangedError(ImportError):
    """This version of Ray lacks a private part that the package uses; the message says what to do."""


def missing(path: str) -> str | None:
    """Why a part of `ADVICE` cannot be used, with the advice; None where it is there."""
    module, _, names = path.partition(":")
    advice = f"Ray has no {path} any more: {ADVICE[path]}"
    try:
        found = import_module(module)
    except ImportError as error:
        return f"{advice} ({error})"
    for name in names.split("."):
        if not hasattr(found, name):
            kind = found if inspect.isclass(found) else type(found)
            return None if _sets(kind, name) else advice
        found = getattr(found, name)
    return None


def _sets(kind: type, name: str) -> bool:
    """Whether the modules of a class of Ray's, or of those that it inherits from, name an attribute."""
    modules = [base.__module__ for base in kind.__mro__ if base.__module__.startswith("ray.")]
    return any(re.search(rf"\.{name}\b|\b{name}:", inspect.getsource(sys.modules[m])) for m in modules)


def _load(path: str) -> Any:
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise RayChangedError(missing(path) or str(error)) from error
    return found


def repartition(dataset: Any, rows: int, num_cpus: float) -> Any:
    """`dataset.repartition(target_num_rows_per_block=rows)`, which reserves a whole CPU for each task,
    with `num_cpus` instead."""
    operator = _load("ray.data._internal.logical.operators:StreamingRepartition")(
        target_num_rows_per_block=rows,
        input_dependencies=[dataset._logical_plan.dag],
        ray_remote_args={"num_cpus": num_cpus},
    )
    plan = _load("ray.data._internal.logical.interfaces:LogicalPlan")(operator, dataset.context)
    return type(dataset)._from_parent(dataset, plan)


class Sparing:
    """A callback of Ray Data's executions that spares the driver most of their bookkeeping.

    Ray adds up what every operator uses, and shares the cluster out to them anew, for each task that it
    starts and twice in each step: more than half of the executor's CPU where blocks have one row. Once for
    `CALLS` of these, or after `SECONDS`, is enough where a pool's size, and not its budget, limits its tasks.
    """

    CALLS, SECONDS = 16, 0.2

    def before_execution_starts(self, executor: Any) -> None:
        manager = executor._resource_manager
        update, last, calls = manager.update_usages, -math.inf, 0

        def sometimes() -> None:
            nonlocal last, calls
            calls += 1
            if calls >= self.CALLS or time.monotonic() - last >= self.SECONDS:
                update()
                last, calls = time.monotonic(), 0

        manager.update_usages = sometimes

    def on_execution_step(self, executor: Any) -> None: ...

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def spare_driver(context: Any) -> None:
    """Have a dataset's execution take less of its driver's CPU; see `Sparing`."""
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Sparing]
    # It looks at every operator for every task. Rows are small: budgets alone keep the object store free.
    context.downstream_capacity_backpressure_ratio = None


def spilled_bytes() -> int:
    """What the object stores of all nodes have written to disk since the cluster started.

    Raises:
        Exception: nobody answers within 10 s; Ray and gRPC have errors of many kinds for it.
    """
    ask, state = _load("ray._private.internal_api:get_memory_info_reply"), _load("ray._private.state:state")
    return int(ask(state, timeout_seconds=10).store_stats.spilled_bytes_total)


def cluster_status() -> tuple[Any, bytes | None]:
    """The autoscaling state of the connected cluster (`ray.rpc.autoscaler.ClusterStatus`' reply), and the
    last report of its monitor as JSON, which only the autoscaler's first version writes."""
    gcs = _load("ray._private.worker:global_worker.gcs_client")
    reply = _load("ray.core.generated.autoscaler_pb2:GetClusterStatusReply")
    report = _load("ray.experimental.internal_kv:_internal_kv_get")
    state = reply.FromString(gcs.get_cluster_status(timeout_s=10)).autoscaling_state
    return state, report("__autoscaling_status")


def session_logs() -> Path:
    """The folder of the logs of this node's workers."""
    return Path(_load("ray._private.worker:global_worker.node").get_logs_dir_path())


def largest_package() -> int:
    """Bytes that a packed working directory must stay under."""
    return int(_load("ray._private.runtime_env.packaging:GCS_STORAGE_MAX_SIZE"))


def package_rules(folder: Path, excludes: Sequence[str]) -> tuple[Any, Callable[[Path], list[Any]]]:
    """What Ray leaves out of a working directory when it packs it.

    Returns:
        A rule of Ray's defaults and `excludes`, for every path of `folder`; and a function of a folder in
        it that reads the rules of its own .gitignore and .rayignore. A rule is a function of a path.
    """
    off = _load("ray._private.ray_constants:RAY_RUNTIME_ENV_IGNORE_GITIGNORE")
    obeyed = os.environ.get(off, "0") != "1"
    defaults = _load("ray._private.ray_constants:get_runtime_env_default_excludes")()
    rule = _load("ray._private.runtime_env.packaging:_get_excludes")
    base = rule(folder, [*defaults, *excludes])
    read = _load("ray._private.runtime_env.packaging:get_excludes_from_ignore_files")
    return base, lambda inside: read(inside, obeyed)


def serve_client() -> Any:
    """The client of the Serve instance that runs in the connected cluster: `get_serve_details` and
    `deploy_apps`."""
    return _load("ray.serve.context:_get_global_client")()


def chat_request(body: dict[str, Any]) -> Any:
    """The body of a chat completion's request as `LLMServer.chat` takes it. Raises ValidationError."""
    kind = _load("ray.llm._internal.serve.core.configs.openai_api_models:ChatCompletionRequest")
    return kind.model_validate(body)


def forget_engine_config(config: Any) -> None:
    """Have an `LLMConfig` read its model's source and engine's arguments again."""
    config._engine_config = None


def __getattr__(name: str) -> Any:
    """Classes to inherit from, made when they are asked for: their modules import vLLM."""
    if name == "VllmBatchActor":
        return _load("ray.llm._internal.batch.stages.vllm_engine_stage:vLLMEngineStageUDF")
    if name == "VLLM_FATAL_ERRORS":
        return _load("ray.llm._internal.batch.stages.vllm_engine_stage:_VLLM_FATAL_ERRORS")
    if name == "VllmServer":
        return _vllm_server()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _vllm_server() -> Any:
    """`ray.serve.llm.LLMServer` on vLLM, with names for what is private in it."""
    from ray.serve.llm import LLMServer

    engine: Any = _load("ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine")

    class OwnExecutorEngine(engine):
        """vLLM with the executor that is asked for: on a CPU, Ray puts another in its place."""

        def _start_async_llm_engine(self, arguments: Any, config: Any, group: Any) -> Any:
            asked = self.llm_config.engine_kwargs.get("distributed_executor_backend")
            if asked is not None:
                config.parallel_config.distributed_executor_backend = asked
            return super()._start_async_llm_engine(arguments, config, group)

    class VllmServer(LLMServer):
        _default_engine_cls = OwnExecutorEngine

        @property
        def config(self) -> Any:
            """The `LLMConfig` of this replica."""
            return self._llm_config

        @property
        def model_config(self) -> Any:
            """vLLM's ModelConfig. The engine must have started."""
            return self.engine._engine_client.model_config

        @property
        def engine_died(self) -> bool:
            return bool(self.engine._engine_client.errored)

        def name_checkpoint(self, name: str) -> None:
            """Put a name into `system_fingerprint` of every answer. The engine must have started."""
            self.engine._oai_serving_chat.system_fingerprint = name

        def skip_download(self) -> None:
            """Start no task on each node that would fetch the checkpoint: its imports alone take as long
            as loading a small model."""
            self._llm_config.get_or_create_callback().ctx.run_init_node = False

    return VllmServer
