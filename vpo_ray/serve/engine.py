"""The engine's replica: vLLM as `ray.serve.llm` deploys it, with one checkpoint of the policy.

It takes and returns JSON, so that its callers need not import vLLM. It is healthy while it answers: after a
while without an answer it is asked for one token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.serve.llm import LLMConfig, ModelLoadingConfig

from vpo_ray.engines.chat.adapter import Adapter, adapter_of
from vpo_ray.engines.chat.cpu_memory import cpu_cache
from vpo_ray.engines.chat.eyes import checkpoint_has_eyes
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.engines.chat.vllm_chat import place_of_image
from vpo_ray.files.image_files import decode_image
from vpo_ray.lifetime import bind_worker
from vpo_ray.prompts.image_places import image_lines
from vpo_ray.prompts.policy_prompt import prompt_ids
from vpo_ray.prompts.thoughts import TAIL, marks_among, opened_thought
from vpo_ray.recipe import Serve
from vpo_ray.serve.config import fingerprint, operation
from vpo_ray.serve.spoken import marked
from vpo_ray.storage.model_cache import fetch_for_engine
from vpo_ray.stream.ray_compat import VllmServer, chat_request, forget_engine_config

logger = logging.getLogger("ray.serve")

# Seconds in which an answer proves that the engine works.
FRESH_S = 10

EngineRefusal = dict[str, Any]


@dataclass(frozen=True)
class Thoughts:
    """Marks of a checkpoint's thoughts that the text of its answers would lack.

    Attributes:
        opened: the mark with which its chat template opens a thought, or "".
        asked: request fields that keep marks which are special tokens in the text.
    """

    opened: str
    asked: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: str) -> Thoughts:
        tokenizer = load_tokenizer(checkpoint)
        prompt = tokenizer.decode(prompt_ids(tokenizer, PROBE["content"])[-TAIL:])
        marks, _ = marks_among(tokenizer)
        return cls(opened_thought(prompt), {"skip_special_tokens": False} if marks else {})


class PolicyServer(VllmServer):
    """One replica; see the module."""

    async def start(self) -> None:
        bind_worker()  # the engine's core is a process, which would outlive this one
        # OpenAI's field for the model that answered, by which a client can tell checkpoints apart.
        name = await asyncio.to_thread(fingerprint, self.config.engine_kwargs["tokenizer"])
        await asyncio.to_thread(_bring, self.config)
        self.skip_download()
        await super().start()
        self.thoughts = await asyncio.to_thread(Thoughts.of, self.config.engine_kwargs["tokenizer"])
        self.answered = time.monotonic()
        self.name_checkpoint(name)

    async def answer(self, body: dict[str, Any]) -> str | EngineRefusal:
        """A whole chat completion as JSON, or a refusal with `code`, `message` and `param`."""
        async for part in self.stream(body):
            return part
        return {"code": 500, "message": "the engine gave no answer"}

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str | EngineRefusal]:
        """Server-sent events where `stream` is set, and one JSON answer otherwise.

        Args:
            body: of a chat completion with one message; it is shown with `image`, the bytes of an image that
                has been decoded before, where that is there.
        """
        place = place_of_image(self.model_config) if "image" in body else None
        if "image" in body and place is None:
            yield {"code": 400, "message": "vLLM shows this policy no images", "param": None}
            return
        shown = body if place is None else await _shown(body, place)
        request = chat_request({**shown, **self.thoughts.asked})
        begun: set[int] = set()
        try:
            async for part in await self.chat(request):
                for item in part if isinstance(part, list) else [part]:
                    if hasattr(item, "error"):
                        self._leave_if_dead()
                        yield item.error.model_dump()
                        continue
                    self.answered = time.monotonic()
                    part = item if isinstance(item, str) else item.model_dump_json(exclude_none=True)
                    yield marked(part, self.thoughts.opened, begun) if self.thoughts.opened else part
        except Exception:
            self._leave_if_dead()
            raise

    def _leave_if_dead(self) -> None:
        """Exit when vLLM's engine, a process of its own, has died. This replica would fail every request
        until Serve has seen three bad health checks. One that exits is replaced at once, and its requests
        are retried on another."""
        if self.engine_died:
            logger.error("the vLLM engine died, exiting to be replaced")
            os._exit(1)

    async def check_health(self) -> None:
        """Called by Serve every few seconds; a replica that fails is replaced. Raises RuntimeError."""
        self._leave_if_dead()
        await super().check_health()
        if time.monotonic() - self.answered > FRESH_S:
            body = {"model": self.config.model_id, "messages": [PROBE], "max_tokens": 1}
            reply = await self.answer(body)
            if not isinstance(reply, str):
                raise RuntimeError(f"the engine does not answer: {reply.get('message')}")


PROBE = {"role": "user", "content": "a"}


async def _shown(body: dict[str, Any], place: str) -> dict[str, Any]:
    """A body with its image as a part of its one message, where sampling has it, and as the picture that
    sampling makes of it."""
    (asked,) = body["messages"]
    picture = await asyncio.to_thread(decode_image, body["image"])
    text = image_lines(place) + asked["content"]
    parts = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": text}]
    rest = {name: value for name, value in body.items() if name != "image"}
    return {**rest, "messages": [{**asked, "content": parts}]}


def _bring(config: LLMConfig) -> None:
    """Fit a replica's configuration to this node: its copies in the place of the URIs of checkpoint, adapter
    and base model, and of its memory what the cache may have. A model that sees has a processor, whose own
    chat template vLLM would take: it is given the one with the task prompt."""
    loading, kwargs = config.model_loading_config, config.engine_kwargs
    loading.model_source = fetch_for_engine(loading.model_source)
    kwargs["tokenizer"] = fetch_for_engine(kwargs["tokenizer"])
    for adapter in kwargs.get("lora_modules", ()):
        adapter.path = fetch_for_engine(adapter.path)
    if checkpoint_has_eyes(loading.model_source):
        kwargs["chat_template"] = load_tokenizer(kwargs["tokenizer"]).chat_template
    kwargs.update(cpu_cache(kwargs))
    forget_engine_config(config)  # which Ray has made of the URIs


def llm_config(folder: str | Path, settings: Serve) -> LLMConfig:
    """The `ray.serve.llm` configuration of a checkpoint, which may be an adapter, with the recipe's settings.

    Args:
        folder: an absolute path, or a URI, which every replica fetches when it starts.

    Raises:
        AdapterError: the adapter's settings cannot be used.
    """
    adapter = adapter_of(str(folder))
    engine, pool, scaling = settings.engine, settings.pool, settings.autoscaling
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_num_seqs": engine.max_num_seqs,
        # Sampling follows the recipe, not the base model's generation config.
        "generation_config": "vllm",
        # The folded template joins the query to the task prompt as a string, not as a list of parts.
        "chat_template_content_format": "string",
        **(_adapted(adapter, settings.model_name) if adapter is not None else {}),
        **({} if pool.num_gpus else engine.executor()),
        **engine.engine_kwargs,
        # The template with the task prompt is in the adapter's tokenizer, not in its base model's.
        "tokenizer": str(folder),
    }
    source = str(folder) if adapter is None else adapter.base
    bundle = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    replicas: dict[str, Any] = {"num_replicas": pool.size[0]}
    if pool.size[0] != pool.size[1]:
        replicas = {
            "autoscaling_config": {
                "min_replicas": pool.size[0],
                "max_replicas": pool.size[1],
                "target_ongoing_requests": scaling.target_ongoing_requests
                or max(1, engine.max_num_seqs // 2),
                "upscale_delay_s": scaling.upscale_delay_s,
                "downscale_delay_s": scaling.downscale_delay_s,
            }
        }
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=settings.model_name, model_source=source),
        engine_kwargs={key: value for key, value in kwargs.items() if value is not None},
        accelerator_type=pool.accelerator_type,
        accelerator_config=None if pool.num_gpus else {"kind": "cpu"},
        placement_group_config={"bundle_per_worker": {k: v for k, v in bundle.items() if v}},
        deployment_config={
            **replicas,
            **operation(settings),
            "max_ongoing_requests": engine.max_num_seqs * 2,
            "max_queued_requests": settings.max_queued_requests,
            # A full engine may need the time of a whole answer before it starts on the probe.
            "health_check_timeout_s": settings.timeout_s,
            "ray_actor_options": {"num_cpus": 0},
        },
        runtime_env={"env_vars": engine.env} if engine.env else None,
    )


def _adapted(adapter: Adapter, name: str) -> dict[str, Any]:
    """Engine options with which `name` means the adapter: vLLM looks up adapters first, and the base model
    alone must not be reachable."""
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    return {**adapter.engine_kwargs(), "lora_modules": [LoRAModulePath(name, adapter.folder)]}
