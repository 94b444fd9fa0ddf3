"""Chat: messages in, text out, for every text stage and any backend.

A stage's work on a row is an async function that takes a `Chat`; a pool runs many rows at once on
one engine, so that the turns of a row (critique, refine, judge again) load the model once.
A backend is the package's own, which its pool builds, or another's (see `recipe.plugins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import isawaitable
from typing import Any, Protocol

from vpo_ray.recipe import ChatModel, plugins
from vpo_ray.records import Row

# `content` is a text; for an endpoint it may be a list of parts, texts and images.
Message = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Prompt and completion tokens, and their cost at an endpoint (0 on our own engines)."""

    prompt: int = 0
    completion: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion, self.cost + other.cost)


class ChatError(RuntimeError):
    """A request that has no usable answer, for example one longer than the model's context.

    Attributes:
        usage: tokens and cost of the request.
    """

    def __init__(self, message: str, usage: Usage = Usage()) -> None:
        super().__init__(message)
        self.usage = usage


class Refusal(ChatError):
    """The model declined to answer, or a content filter stopped it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `top_k` -1 is no limit."""

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
    cost: float = 0.0

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.cost)


class Chat(Protocol):
    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        """One answer. With a JSON schema the text is an object of it.

        Raises:
            ChatError: the request does not fit the model, or has no usable answer.
        """
        ...


def build(settings: ChatModel) -> Chat:
    """A chat engine from outside the package. Raises PluginError if it cannot be found or built."""
    chat: Chat = plugins.find(settings).build(settings)
    return chat


class Metered:
    """A chat for one row that adds up the usage of its turns, failed ones included."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.usage = chat, Usage()

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        try:
            asked: Any = self.chat.complete(messages, sampling, schema)
            if not isawaitable(asked):
                engine = type(self.chat).__name__
                raise ChatError(f"{engine}.complete is not asynchronous: define it with `async def`")
            answer = _checked(await asked, self.chat)
        except ChatError as error:
            self.usage += error.usage
            raise
        self.usage += answer.usage
        return answer


def _checked(answer: Any, chat: Chat) -> Answer:
    """The answer with numbers that a table takes. Raises ChatError for what is none."""
    gave = f"{type(chat).__name__}.complete gave"
    if not isinstance(answer, Answer):
        raise ChatError(f"{gave} {type(answer).__name__}, not an Answer")
    if not isinstance(answer.text, str):
        raise ChatError(f"{gave} an Answer whose text is {type(answer.text).__name__}")
    try:
        prompt, completion = int(answer.prompt_tokens or 0), int(answer.completion_tokens or 0)
        cost = float(answer.cost or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise ChatError(f"{gave} an Answer whose tokens or cost are no numbers: {error}") from error
    return replace(answer, prompt_tokens=prompt, completion_tokens=completion, cost=cost)


class ChatStage(Protocol):
    """A text stage: which rows it takes, and what it does with one."""

    name: str

    def wants(self, row: Row) -> bool: ...

    async def __call__(self, row: Row, chat: Chat) -> Row: ...
