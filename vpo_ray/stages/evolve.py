"""Evolve: an LLM is shown a query with its best prompts so far and their scores, and writes new ones.

A row is one round of one query (`evolution.next_ask`). What it wrote is looked through before anything is
paid for: a text of the wrong form, or one that repeats an earlier prompt, is kept with the reason and not
rendered. All texts are data: they enter the prompt as JSON strings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.prompts.answers import AnswerError, object_schema, parse_object, string_schema
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Evolve, Judge, NearDuplicates, Recipe
from vpo_ray.records import Row, seed_of
from vpo_ray.stages.curate.duplicates import near_duplicates, signatures
from vpo_ray.stages.curate.rules import comparable
from vpo_ray.stages.facts import Fact, of_chat, of_prompt
from vpo_ray.stages.judge import form_fault
from vpo_ray.stages.spec import Making, evolving_model
from vpo_ray.stages.tally import Tally, by_reason

HISTORY, COUNT = "{history}", "{count}"  # slots of its prompt, beside the query's
EQUAL, ALIKE = "duplicate", "near duplicate"
_ENTRY = "<tried>\n<prompt>{prompt}</prompt>\n<scores>{scores}</scores>\n</tried>"
_MORE = "\n\nThese new prompts are written already; write others:\n\n{written}"


class Evolver:
    """Asks for the prompts of one round; once more where the answer has fewer than it was asked for."""

    name = "evolve"

    def __init__(self, settings: Evolve, judge: Judge) -> None:
        self.settings, self.judge = settings, judge
        self.template = read_prompt(settings.prompt)

    def wants(self, row: Row) -> bool:
        return row["written"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        """Raises ChatError where there is no answer, AnswerError where two have no prompts at all."""
        try:
            written = await self._ask(row, chat, [])
        except AnswerError:
            written = []
        if len(written) < row["wanted"]:
            try:
                written += await self._ask(row, chat, written)
            except AnswerError:
                if not written:
                    raise
        if not written:
            raise AnswerError("two answers of the LLM hold no prompt")
        reasons = why_skipped(written, row["known"], self.judge.word_limit, self.settings.near_duplicates)
        found = [{"prompt": text, "skipped": why} for text, why in zip(written, reasons, strict=True)]
        found += [{"prompt": None, "skipped": None}] * (row["wanted"] - len(found))
        return {**row, "written": found}

    async def _ask(self, row: Row, chat: Chat, written: Sequence[str]) -> list[str]:
        """At most so many prompts as are missing."""
        missing = row["wanted"] - len(written)
        text = fill(self.template, {"history": _history(row), "count": str(missing)}, query=row["query"])
        if written:
            text += fill(_MORE, {"written": "\n".join(fill("{prompt}", prompt=one) for one in written)})
        prompts = {"type": "array", "items": string_schema(self.judge.prompt_max_chars), "maxItems": missing}
        properties = {"prompts": prompts}
        seed = seed_of("evolve", row["seed"], len(written))
        sampling = Sampling(self.settings.temperature, self.settings.max_tokens, seed)
        answer = await chat.complete([{"role": "user", "content": text}], sampling, object_schema(properties))
        return parse_prompts(answer.text)[:missing]


def parse_prompts(text: str) -> list[str]:
    """The texts `prompts` of an answer that are not empty. Raises AnswerError where there is no such list."""
    properties = {"prompts": {"type": "array", "items": {"type": "string"}}}
    value = parse_object(text, properties).get("prompts")
    if not isinstance(value, list):
        raise AnswerError(f"the answer has no list `prompts`: {text[:200]!r}")
    return [one.strip() for one in value if isinstance(one, str) and one.strip()]


def _history(row: Row) -> str:
    """The prompts that are shown, the query first."""
    blocks = [
        fill(_ENTRY, {"scores": _scores(shown)}, prompt=shown["prompt"]) for shown in row["shown"] or []
    ]
    return "\n\n".join(blocks) or "(none has a score yet)"


def _scores(shown: Row) -> str:
    """Fitness and raw dimensions, as JSON; names are the recipe's, and quoted as text is."""
    scores = {part["name"]: round(part["score"], 3) for part in shown["dimensions"] or []}
    text = json.dumps({"total": round(shown["fitness"], 3), **scores}, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("[", "\\u005b")


def why_skipped(
    prompts: Sequence[str], known: Sequence[str], word_limit: int, near: NearDuplicates | None
) -> list[str | None]:
    """Why no video is made of each prompt, or None.

    Args:
        known: earlier prompts of the query, and the query.
        near: how alike two prompts are that count as one; equal ones only when unset.
    """
    reasons = [form_fault(prompt, word_limit) for prompt in prompts]
    # What has the wrong form is no rival of what has the right one.
    places = [place for place, reason in enumerate(reasons) if reason is None]
    texts = [*known, *(prompts[place] for place in places)]
    folded = [comparable(text) or text for text in texts]
    alike = np.zeros(len(texts), bool)
    if near is not None and places:
        alike, _ = near_duplicates(*signatures(texts, near), near.threshold)
    for at, place in enumerate(places, start=len(known)):
        if folded[at] in folded[:at]:
            reasons[place] = EQUAL
        elif alike[at]:
            reasons[place] = ALIKE
    return reasons


def make(making: Making) -> Callable[[], Evolver]:
    settings = making.recipe.evolve
    assert settings is not None
    return partial(Evolver, settings, making.recipe.judge)


def facts(recipe: Recipe) -> Iterator[Fact]:
    assert recipe.evolve is not None
    yield from of_chat(*evolving_model(recipe))
    yield from of_prompt("evolve.prompt", recipe.evolve.prompt)


class EvolveTally(Tally):
    """How many prompts were written, and why some are not rendered."""

    columns = ("written",)

    def __init__(self) -> None:
        self.prompts = 0
        self.not_rendered: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        for one in row["written"] or []:
            self.prompts += one["prompt"] is not None
            why = "missing" if one["prompt"] is None else one["skipped"]
            self.not_rendered.update([why] if why is not None else [])

    def result(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "not_rendered": by_reason(self.not_rendered)}


tally = EvolveTally
