"""The vLLM backend of the chat engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from vpo_ray.engines.chat import Answer, ChatError, Message, Sampling
from vpo_ray.engines.chat.adapter import Adapter
from vpo_ray.prompts.answers import find_object
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
        self._ids = itertools.count()

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        try:
            ids = chat_ids(self.tokenizer, messages)
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
        async with self.slots:
            stream = self.engine.generate(
                TokensPrompt(prompt_token_ids=ids), params, str(next(self._ids)), lora_request=self._lora
            )
            async for output in stream:
                final = output
        answer = final.outputs[0]
        text = self._text(answer, ids, schema)
        return Answer(text, answer.finish_reason or "unknown", len(ids), len(answer.token_ids))

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
