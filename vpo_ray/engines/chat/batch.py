"""Batch inference of a trained policy on this machine, without Ray: many queries in, their prompts out.

    vpo_ray.optimise("runs/laptop/checkpoints/dpo", ["a cat", "waves at night"])

Offline data sets are optimised so; `vpo serve` is for requests as they come.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpo_ray.engines.chat.adapter import adapter_of
from vpo_ray.engines.chat.cpu_memory import cpu_cache
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.folder import chunks
from vpo_ray.prompts.policy_prompt import PromptError, prompt_ids
from vpo_ray.prompts.thoughts import TAIL, UnclosedThought, marks_among, opened_thought, without_thoughts
from vpo_ray.recipe import locate
from vpo_ray.records import normalise, seed_of
from vpo_ray.storage.model_cache import fetch, fetch_for_engine

Backend = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class Optimised:
    """What became of one query. prompt: None where there is an error. error: why there is no prompt."""

    query: str
    prompt: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


def optimise(
    checkpoint: str,
    queries: Iterable[str],
    *,
    backend: Backend | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_tokens: int = 1024,
    seed: int = 0,
    batch_size: int = 16,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> list[Optimised]:
    """The prompts that a trained policy writes for queries, in their order.

    Args:
        checkpoint: folder or URI of a policy that `vpo` trained; it carries its task prompt. A LoRA
            adapter is loaded with the base model that it names.
        backend: None takes vLLM where it is installed. Temperature 0 gives one prompt whatever the
            batch; above it, vLLM's prompt of a query depends on `seed` and the query, that of
            transformers on the batch as well.
        max_tokens: of a prompt.
        batch_size: queries at once; for transformers only, vLLM makes its own batches.
        engine_kwargs: arguments of vLLM's `LLM`, or of transformers' `from_pretrained`.

    Returns:
        One `Optimised` a query. A query that fails (no text, longer than the model takes, a prompt that
        ends within a thought or is empty) has its own error, and the others their prompts.

    Raises:
        PromptError: the checkpoint is no policy of `vpo_ray`.
        AdapterError, StorageError: it cannot be loaded.
    """
    checkpoint = locate(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    sampling = _Sampling(temperature, top_p, max_tokens, seed)
    if backend is None:
        backend = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    build = _Vllm if backend == "vllm" else _Transformers
    engine = build(checkpoint, tokenizer, dict(engine_kwargs or {}), batch_size)
    results, asked = [], []
    for position, query in enumerate(queries):
        ids, error = _ids(tokenizer, query, engine.max_length - max_tokens)
        results.append(Optimised(query, error=error))
        if error is None:
            asked.append((position, ids))
    answers = engine.answers([ids for _, ids in asked], [results[at].query for at, _ in asked], sampling)
    marks, special = marks_among(tokenizer)
    for (position, ids), answer in zip(asked, answers, strict=True):
        shown = [token for token in answer if token not in special]
        text = opened_thought(tokenizer.decode(ids[-TAIL:])) + tokenizer.decode(
            shown, skip_special_tokens=not marks.intersection(shown)
        )
        results[position] = _result(results[position].query, text)
    return results


def _ids(tokenizer: Any, query: Any, room: int) -> tuple[list[int], str | None]:
    """A query's prompt as the policy sees it, or why there is none."""
    if not isinstance(query, str) or not query.strip():
        return [], "no text"
    try:
        ids = prompt_ids(tokenizer, normalise(query))
    except (PromptError, UnicodeEncodeError) as error:
        return [], f"{type(error).__name__}: {error}"
    if len(ids) > room:
        return [], f"{len(ids)} prompt tokens, the model takes {room}: shorten the query or lower max_tokens"
    return ids, None


def _result(query: str, text: str) -> Optimised:
    try:
        prompt = without_thoughts(text).strip()
    except UnclosedThought as error:
        return Optimised(query, error=f"UnclosedThought: {error}")
    return Optimised(query, prompt) if prompt else Optimised(query, error="the policy's answer is empty")


class _Vllm:
    def __init__(self, checkpoint: str, tokenizer: Any, arguments: dict[str, Any], batch_size: int) -> None:
        from vllm import LLM

        self.lora = None
        model, adapter = checkpoint, adapter_of(checkpoint)
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            adapter = adapter.on_node()
            self.lora = LoRARequest("adapter", 1, adapter.folder)
            model, arguments = adapter.base, {**adapter.engine_kwargs(), **arguments}
        own = fetch_for_engine(checkpoint)
        given = {**cpu_cache(arguments), **arguments}
        self.llm = LLM(model=fetch_for_engine(model), tokenizer=own, **given)
        self.max_length: int = self.llm.model_config.max_model_len

    def answers(
        self, prompts: Sequence[list[int]], queries: Sequence[str], sampling: _Sampling
    ) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

        given = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed_of("optimise", sampling.seed, query),
                detokenize=False,
            )
            for query in queries
        ]
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        done = self.llm.generate(asked, given, use_tqdm=False, lora_request=self.lora) if asked else []
        return [list(answer.outputs[0].token_ids) for answer in done]


class _Transformers:
    def __init__(self, checkpoint: str, tokenizer: Any, arguments: dict[str, Any], batch_size: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # An adapter's folder loads with its base.
        given = {"dtype": "auto", **arguments}
        self.model = AutoModelForCausalLM.from_pretrained(fetch(checkpoint), **given).to(device).eval()
        self.max_length: int = self.model.config.max_position_embeddings
        self.batch_size = batch_size
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        padding = tokenizer.pad_token_id
        self.padding = tokenizer.eos_token_id if padding is None else padding

    def answers(
        self, prompts: Sequence[list[int]], queries: Sequence[str], sampling: _Sampling
    ) -> Iterator[list[int]]:
        import torch

        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            drawn["top_k"] = 0
        torch.manual_seed(sampling.seed)
        for batch in chunks(prompts, self.batch_size):
            width = max(map(len, batch))
            ids = torch.tensor([[self.padding] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            with torch.inference_mode():
                out = self.model.generate(
                    ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=sampling.max_tokens,
                    pad_token_id=self.padding,
                    **drawn,
                )
            for row in out[:, width:].tolist():
                end = next((n for n, token in enumerate(row) if token in self.ends), len(row))
                yield row[:end]
