"""Prefer: an LLM is shown what two policies made of one query, and says which is better.

A row is one question. What is compared is called 1 and 2, so that the LLM cannot know whose it is; who
compares two policies asks in both orders (see `evaluation.preferences`). The recipe of the run directory has
that preference alone in its `evaluate` section (see `spec.preference`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.engines.reward.frames import image_part, read_frames
from vpo_ray.files.input_files import file_at
from vpo_ray.prompts.answers import AnswerError, object_schema, parse_object, string_schema
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Preference, Recipe
from vpo_ray.records import Row, content_id, seed_of
from vpo_ray.stages.facts import Fact, of_chat, of_prompt
from vpo_ray.stages.spec import Making, preference, preference_model
from vpo_ray.stages.tally import Tally, by_reason

_ANSWERS = {"1": "a", "2": "b", "tie": "tie"}


def match_row(query: str, query_id: str, a: str, b: str, uris: tuple[str, str] | None = None) -> Row:
    """The PREFERENCE row of a question. Its id follows from what is compared, not from who made it.

    Args:
        a, b: the prompts, or the keys of the videos; `a` is shown first.
        uris: of the videos.
    """
    what = "prompt" if uris is None else "video"
    a_uri, b_uri = uris or (None, None)
    row = {"preference_id": content_id("preference", what, query, a, b), "query_id": query_id, "query": query}
    return {**row, "a": a, "b": b, "a_uri": a_uri, "b_uri": b_uri}


class Preferring:
    """Asks for one answer.

    Args:
        question: a prompt file, with the slots `{query}` and, for prompts, `{first}` and `{second}`.
        max_chars: of the reason.
    """

    name = "prefer"

    def __init__(self, settings: Preference, question: str, max_chars: int) -> None:
        self.settings, self.question = settings, read_prompt(question)
        better = {"type": "string", "enum": list(_ANSWERS)}
        self.properties: dict[str, Any] = {"reason": string_schema(max_chars), "better": better}

    def wants(self, row: Row) -> bool:
        return row["answer"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        """Raises AnswerError for an answer without a preference, ChatError where there is none, RewardError
        or OSError for a video that cannot be read."""
        content: Any = fill(self.question, query=row["query"], first=row["a"], second=row["b"])
        if row["a_uri"] is not None:
            content = [_text(content)]
            for number, name in enumerate(("a_uri", "b_uri"), 1):
                content += [_text(f"Video {number}:"), *await asyncio.to_thread(self._images, row[name])]
        sampling = Sampling(0.0, self.settings.max_tokens, seed_of("prefer", row["preference_id"]))
        messages = [{"role": "user", "content": content}]
        text = (await chat.complete(messages, sampling, object_schema(self.properties))).text
        better = parse_object(text, self.properties).get("better")
        if better not in _ANSWERS:
            raise AnswerError(f'the answer has no `better` of "1", "2" or "tie": {text[:200]!r}')
        return {**row, "answer": _ANSWERS[better], "raw": text}

    def _images(self, uri: str) -> list[dict[str, Any]]:
        """So many frames at equal distances, the first and the last among them; one may occur twice."""
        with file_at(uri).open() as stream:
            data = stream.read()
        frames = read_frames(data, lambda times, _: _at_equal_distances(len(times), self.settings.frames))
        return [image_part(frame) for frame in frames]


def _at_equal_distances(length: int, number: int) -> list[int]:
    return [int(index) for index in np.linspace(0, length - 1, number).round()]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def make(making: Making) -> Callable[[], Preferring]:
    key, settings = preference(making.recipe)
    return partial(Preferring, settings, _question(key, settings), making.recipe.judge.critique_max_chars)


def _question(key: str, settings: Preference) -> str:
    return settings.question or ("builtin:prefer_videos" if key.endswith("videos") else "builtin:prefer")


def facts(recipe: Recipe) -> Iterator[Fact]:
    key, settings = preference(recipe)
    yield from of_chat(*preference_model(recipe))
    yield from of_prompt(f"{key}.question", _question(key, settings))


class PreferTally(Tally):
    """How often what was shown first was preferred, and what second."""

    columns = ("answer",)

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        self.answers[row["answer"] or "none"] += 1

    def result(self) -> dict[str, Any]:
        return {"answers": by_reason(self.answers)}


tally = PreferTally
