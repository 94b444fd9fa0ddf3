"""Rows to token ids: the prompt the policy sees, and the responses whose tokens are learnt.

A response is the text's tokens and the end-of-turn token, nothing else; its tokens are exactly
the loss mask. Rows that cannot be used are dropped here, each with a counted reason, before a
worker is started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vpo_ray.prompts.conditions import asked_of
from vpo_ray.prompts.policy_prompt import PromptError, control_tokens, neutralise, own_template, prompt_ids
from vpo_ray.records import Row, sft_id

Phase = Literal["sft", "dpo", "rl"]

# Per phase: the row's key, and the columns that are learnt (for DPO chosen, then rejected; for RL all
# prompts of a query, and their advantages).
COLUMNS: Mapping[Phase, tuple[str, tuple[str, ...]]] = {
    "sft": ("query_id", ("prompt",)),
    "dpo": ("pair_id", ("chosen", "rejected")),
    "rl": ("group_id", ("prompts", "advantages")),
}


class TrainError(RuntimeError):
    """Training that cannot start or continue; the message says why and what to do."""


@dataclass(frozen=True)
class Example:
    """One row as token ids: int32 arrays; the length of a response counts its end-of-turn token. A prompt's
    ids below 0 are features of an image (see `images`). For RL each response has an advantage."""

    id: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    advantages: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the example in a pack that shares no prompt with another."""
        return len(self.prompt) + self.response_tokens

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))


def row_id(phase: Phase, row: Row) -> str:
    """The id of a row's example: SFT may teach several prompts of one query, each under several profiles."""
    if phase == "sft":
        return sft_id(row["query_id"], row["prompt"], row.get("conditions"))
    return str(row[COLUMNS[phase][0]])


def tokenise(
    phase: Phase,
    rows: Iterable[Row],
    tokenizer: Any,
    task_prompt: str,
    max_length: int,
    shown: Callable[[str, str], list[int]] | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Examples in the order of their ids, and the number of dropped rows by reason.

    A prompt and its longest response must fit in `max_length` tokens, those of an image included. Neither is
    ever cut: a response without its end, or a prompt without its query, teaches the wrong thing.

    Args:
        shown: the tokens of the prompt for a query and its image, where the policy is shown images.

    Raises:
        TrainError: a row lacks a column, or no row is left.
    """
    end, controls = end_of_turn(tokenizer, task_prompt), control_tokens(tokenizer)
    examples: dict[str, Example] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        texts = _responses(phase, row)
        identity = row_id(phase, row)
        fault = "duplicate" if identity in examples else _fault(phase, texts)
        if fault is None:
            try:
                prompt = _array(_prompt(row, tokenizer, shown))
            except PromptError:
                fault = "changed by the chat template"
        if fault is None:
            safe = [neutralise(text, controls) for text in texts]
            responses = [_array(tokenizer.encode(text, add_special_tokens=False) + end) for text in safe]
            if len(prompt) + max(map(len, responses)) > max_length:
                fault = f"longer than {max_length} tokens"
        if fault is None:
            advantages = tuple(row["advantages"]) if phase == "rl" else ()
            examples[identity] = Example(identity, prompt, tuple(responses), advantages)
        else:
            dropped[fault] += 1
    if not examples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the table is empty"
        raise TrainError(f"no row is left to train {phase} on: {reasons}")
    return [examples[name] for name in sorted(examples)], dropped


def _prompt(row: Row, tokenizer: Any, shown: Callable[[str, str], list[int]] | None) -> list[int]:
    if shown is None or row.get("image") is None:
        return prompt_ids(tokenizer, asked_of(row))
    return shown(asked_of(row), row["image"])


def _responses(phase: Phase, row: Row) -> list[str]:
    key, columns = COLUMNS[phase]
    if phase == "rl":
        _check_group(row)
        return list(row["prompts"])
    missing = [name for name in (key, "query", *columns) if not isinstance(row.get(name), str)]
    if missing:
        raise TrainError(
            f"a {phase} row has no text in {', '.join(missing)}; it has {', '.join(sorted(row))}"
        )
    return [row[name] for name in columns]


def _check_group(row: Row) -> None:
    prompts, advantages = row.get("prompts"), row.get("advantages")
    texts = isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)
    numbers = isinstance(advantages, list) and all(isinstance(value, float) for value in advantages)
    if not (texts and numbers and len(prompts or ()) == len(advantages or ())):
        raise TrainError("an rl row has no list of prompts with as many advantages")
    if not (isinstance(row.get("group_id"), str) and isinstance(row.get("query"), str)):
        raise TrainError("an rl row has no text in group_id or query")


def _fault(phase: Phase, responses: list[str]) -> str | None:
    if not responses or not all(text.strip() for text in responses):
        return "empty response"
    # A policy may write one prompt twice, which then has twice the weight.
    same = phase != "rl" and len(set(responses)) < len(responses)
    return "chosen equals rejected" if same else None


def _array(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def end_of_turn(tokenizer: Any, task_prompt: str) -> list[int]:
    """Ids of what the model's own chat template puts after an assistant message, up to the first
    control token (`<|eot_id|>` for Llama 3); the tokenizer's EOS where it puts none.

    Raises:
        TrainError: the checkpoint has another task prompt, or there is no such token.
    """
    own = own_template(tokenizer.chat_template, task_prompt)
    if own is None:
        raise TrainError(
            "the checkpoint has another task prompt than the recipe: set policy.task_prompt to it"
        )
    answer = "vpo-ray-answer"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    tail = tokenizer.apply_chat_template(turns, chat_template=own, tokenize=False).rpartition(answer)[2]
    ids = tokenizer.encode(tail, add_special_tokens=False)
    stops = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))) - {tokenizer.unk_token_id}
    first = next((n for n, token in enumerate(ids) if token in stops), None)
    if first is not None:
        return ids[: first + 1]
    if tokenizer.eos_token_id is None:
        raise TrainError(
            "neither the chat template nor the tokenizer has an end-of-turn token; set eos_token"
        )
    return [tokenizer.eos_token_id]
