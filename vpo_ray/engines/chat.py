"""Chat: messages in, text out. What a text stage asks of an LLM, whichever backend answers.

A stage's work on a row is an async function that takes a `Chat`; a pool runs many rows at once on
one engine, so that several turns of one row (critique, refine, judge again) load the model once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vpo_ray.records import Row

Message = dict[str, str]


class ChatError(RuntimeError):
    """A request that cannot be answered, for example one longer than the model's context."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `top_k` -1 is no limit."""

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Chat(Protocol):
    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        """One answer. With a JSON schema the text is an object of it.

        Raises:
            ChatError: the request does not fit the model.
        """
        ...


class ChatStage(Protocol):
    """A text stage: which rows it takes, and what it does to one."""

    name: str

    def wants(self, row: Row) -> bool: ...

    async def __call__(self, row: Row, chat: Chat) -> Row: ...
