"""Label: the judge says of raw queries whether they are unsafe, for the unsafe share of curation.

Labels that come with a query log are noisy; VPO judged its unsafe queries again with an LLM (3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.prompts.answers import AnswerError, object_schema, parse_object, string_schema
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Judge, Recipe
from vpo_ray.records import Row, seed_of
from vpo_ray.stages.facts import Fact, of_chat, of_prompt
from vpo_ray.stages.spec import Making
from vpo_ray.stages.tally import Tally, by_reason


def label_row(query: Row) -> Row:
    """The LABEL row of a Query row: with the label that its input had, if it had one."""
    return {**{name: query[name] for name in ("query_id", "query", "unsafe")}, "image": query.get("image")}


class Labeller:
    """Asks for one verdict a query.

    Args:
        settings: the judge, whose limits hold.
        prompt: a prompt file with a slot `{text}`.
    """

    name = "label"

    def __init__(self, settings: Judge, prompt: str) -> None:
        self.settings, self.prompt = settings, read_prompt(prompt)

    def wants(self, row: Row) -> bool:
        return row["unsafe"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        """Raises AnswerError for an answer without a verdict, ChatError where there is none."""
        text = fill(self.prompt, text=row["query"])
        sampling = Sampling(
            temperature=self.settings.temperature,
            max_tokens=self.settings.max_tokens,
            seed=seed_of("label", row["query_id"]),
        )
        properties: dict[str, Any] = {
            "reason": string_schema(self.settings.critique_max_chars),
            "unsafe": {"type": "boolean"},
        }
        asked = [{"role": "user", "content": text}]
        text = (await chat.complete(asked, sampling, object_schema(properties))).text
        answer = parse_object(text, properties)
        unsafe, reason = answer.get("unsafe"), answer.get("reason")
        if not isinstance(unsafe, bool) or not isinstance(reason, str):
            raise AnswerError(f"the judge's answer has no reason and `unsafe`: {str(answer)[:200]}")
        return {**row, "unsafe": unsafe, "reason": reason}


def make(making: Making) -> Callable[[], Labeller]:
    return partial(Labeller, making.recipe.judge, making.recipe.queries.unsafe_prompt)


def facts(recipe: Recipe) -> Iterator[Fact]:
    yield from of_chat("judge", recipe.judge)
    yield from of_prompt("queries.unsafe_prompt", recipe.queries.unsafe_prompt)


class LabelTally(Tally):
    """Rows are queries before the subset is chosen."""

    columns = ("unsafe",)

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        self.verdicts["unsafe" if row["unsafe"] else "safe"] += 1

    def result(self) -> dict[str, Any]:
        return {"verdicts": by_reason(self.verdicts)}


tally = LabelTally
