"""The Serve application: vLLM's deployment of `ray.serve.llm` behind our own HTTP ingress.

`vpo serve CHECKPOINT` runs it; an OpenAI client then gets the optimised prompt for a raw query by
changing its `base_url`. Ray's own tools take it as `vpo_ray.serve.app:app`:

    serve run vpo_ray.serve.app:app checkpoint=runs/demo/checkpoints/dpo
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, LLMServer, ModelLoadingConfig, build_llm_deployment

from vpo_ray.policy_prompt import PromptError, control_tokens, load_tokenizer
from vpo_ray.recipe import Section, Serve
from vpo_ray.serve.ingress import Ingress

# An answer that is being written when its replica is told to stop may be finished: a long one takes
# most of a minute on a busy engine, Serve's own limit is 20 s.
DRAIN_SECONDS = 60


class Arguments(Section):
    """What `serve run` and the `args` of a Serve config file give."""

    checkpoint: str
    serve: Serve = Serve()


def app(arguments: Arguments) -> Application:
    """The application for Ray's own tools; see `build_app`."""
    return build_app(arguments.checkpoint, arguments.serve)


class PolicyServer(LLMServer):
    """The engine's replica. It speaks JSON, so that the ingress need not import vLLM."""

    async def start(self) -> None:
        # The checkpoint is a folder that every node sees. Ray would start a task on each node to
        # download it, whose imports alone take as long as loading a small model.
        self._llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().start()

    async def chat_json(self, body: dict[str, Any]) -> AsyncIterator[str | dict[str, Any]]:
        """One JSON answer, or server-sent events where `stream` is set; a refusal is a dict with
        `code`, `message` and `param`."""
        from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest

        request = ChatCompletionRequest.model_validate(body)
        async for part in await self.chat(request):
            for item in part if isinstance(part, list) else [part]:
                if isinstance(item, str):
                    yield item
                elif hasattr(item, "error"):
                    yield item.error.model_dump()
                else:
                    yield item.model_dump_json(exclude_none=True)


def build_app(checkpoint: str, settings: Serve) -> Application:
    """The application of one checkpoint.

    Args:
        checkpoint: a folder as training leaves it: weights, and a tokenizer whose chat template
            holds the task prompt.

    Raises:
        PromptError: no such folder, no checkpoint in it, or no task prompt in its chat template.
    """
    folder = Path(checkpoint).resolve()
    if not (folder / "config.json").is_file():
        what = "is no checkpoint: it has no config.json" if folder.is_dir() else "does not exist"
        raise PromptError(f"{checkpoint} {what}; give the folder that training wrote")
    if not any(folder.glob("*.safetensors")):
        raise PromptError(
            f"{checkpoint} holds no weights (*.safetensors); give the folder that training wrote"
        )
    tokenizer = load_tokenizer(str(folder))
    engine = build_llm_deployment(_llm_config(folder, settings), deployment_cls=PolicyServer)
    ingress = serve.deployment(
        Ingress,
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={"num_cpus": min(0.1, settings.pool.num_cpus)},
    )
    return ingress.bind(engine, settings, control_tokens(tokenizer))


def _llm_config(folder: Path, settings: Serve) -> LLMConfig:
    engine, pool = settings.engine, settings.pool
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_num_seqs": engine.max_num_seqs,
        # The sampling settings are the recipe's, not those that the base model's authors left.
        "generation_config": "vllm",
        # The folded template joins the query to the task prompt as a string, not as a list of parts.
        "chat_template_content_format": "string",
        **engine.engine_kwargs,
    }
    bundle = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    replicas: dict[str, Any] = {"num_replicas": pool.size[0]}
    if pool.size[0] != pool.size[1]:
        replicas = {
            "autoscaling_config": {
                "min_replicas": pool.size[0],
                "max_replicas": pool.size[1],
                "target_ongoing_requests": max(1, engine.max_num_seqs // 2),
            }
        }
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=settings.model_name, model_source=str(folder)),
        engine_kwargs={key: value for key, value in kwargs.items() if value is not None},
        accelerator_type=pool.accelerator_type,
        accelerator_config=None if pool.num_gpus else {"kind": "cpu"},
        placement_group_config={"bundle_per_worker": {k: v for k, v in bundle.items() if v}},
        deployment_config={
            **replicas,
            "max_ongoing_requests": engine.max_num_seqs * 4,
            "graceful_shutdown_timeout_s": DRAIN_SECONDS,
            "ray_actor_options": {"num_cpus": 0},
        },
        runtime_env={"env_vars": engine.env} if engine.env else None,
    )
