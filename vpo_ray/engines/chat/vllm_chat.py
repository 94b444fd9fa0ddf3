"""The vLLM backend of the chat engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from vpo_ray.engines.chat import Answer, ChatError, Message, Sampling
from vpo_ray.engines.chat.adapter import Adapter
from vpo_ray.files.image_files import decode_image, of_data_uri
from vpo_ray.prompts.answers import find_object
from vpo_ray.prompts.image_places import image_lines
from vpo_ray.prompts.policy_prompt import PromptError, chat_ids
from vpo_ray.prompts.thoughts import TAIL, marks_among, opened_thought

logger = logging.getLogger(__name__)


class VllmChat:
    """Chat on a vLLM async engine; requests of all callers are batched by the engine."""

    def __init__(self, wrapper: Any, tokenizer: Any, adapter: Adapter | None = None) -> None:
        self._lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, adapter.folder)
        self.engine, self.slots = wrapper.engine, wrapper.semaphore
        self.tokenizer = tokenizer
        self._marks, self._special = marks_among(tokenizer)
        self.max_model_len: int = wrapper._vllm_config.model_config.max_model_len
        self._place = place_of_image(wrapper._vllm_config.model_config)
        self._ids = itertools.count()

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        texts, images = _without_images(messages)
        if images and self._place is None:
            raise ChatError(
                "the model cannot see images: take a vision-language model, or write `images: ignore` beside "
                "the model's name, and it reads the text alone"
            )
        try:
            before = image_lines(self._place, len(images)) if self._place else ""
            ids = chat_ids(self.tokenizer, texts, before)
        except PromptError as error:
            raise ChatError(str(error)) from error
        if len(ids) + sampling.max_tokens > self.max_model_len:
            raise ChatError(
                f"{len(ids)} prompt tokens and {sampling.max_tokens} to generate exceed the model's "
                f"{self.max_model_len}: raise engine.max_model_len or lower max_tokens"
            )
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            structured_outputs=(StructuredOutputsParams(json=schema) if schema else None),
        )
        shown: Any = {"multi_modal_data": {"image": images}} if images else {}
        async with self.slots:
            asked = TokensPrompt(prompt_token_ids=ids, **shown)
            name = str(next(self._ids))
            stream = self.engine.generate(asked, params, name, lora_request=self._lora)
            async for output in stream:
                final = output
        answer = final.outputs[0]
        text = self._text(answer, ids, schema)
        length = len(final.prompt_token_ids or ids)  # an image's tokens included
        return Answer(text, answer.finish_reason or "unknown", length, len(answer.token_ids))

    def _text(self, answer: Any, prompt: Sequence[int], schema: dict[str, Any] | None) -> str:
        """The answer with the marks of its thoughts: special tokens, and the mark that the chat template
        wrote."""
        text: str = answer.text
        if self._marks.intersection(answer.token_ids):
            shown = [token for token in answer.token_ids if token not in self._special]
            text = self.tokenizer.decode(shown, skip_special_tokens=False)
        if schema is not None:
            return find_object(text, schema)
        return opened_thought(self.tokenizer.decode(list(prompt[-TAIL:]))) + text


def place_of_image(config: Any) -> str | None:
    """What stands for an image in the prompts of a model, by its vLLM ModelConfig; None for one that cannot
    see."""
    if not config.is_multimodal_model:
        return None
    from vllm.model_executor.models import ModelRegistry

    kind, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    try:
        place: str | None = kind.get_placeholder_str("image", 1)
    except ValueError:  # it hears or reads, and does not see
        return None
    return place


def _without_images(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages with the texts of their parts alone, and the images of these parts as pictures."""
    texts, images = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            images += [decode_image(of_data_uri(url)) for url in urls]
            content = "\n\n".join(part["text"] for part in content if part["type"] == "text")
        texts.append({**message, "content": content})
    return texts, images
