"""Judge: an LLM critiques each candidate; a misaligned one is refined and judged again.

The query and the prompt under judgement are data: they enter the template as JSON strings with
`<` and `[` escaped, so that no text can close its delimiter or spell a control token. The answer is
held to a JSON schema, so a verdict always parses; an answer that does not is an error of this row,
never a silent "no".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.prompts.answers import AnswerError, object_schema, parse_object, string_schema
from vpo_ray.prompts.conditions import NONE, Conditions, kinds
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Judge, Recipe
from vpo_ray.records import VERDICTS, Row, Verdict, seed_of
from vpo_ray.stages.facts import Fact, of_chat, of_judge_prompts
from vpo_ray.stages.spec import Making
from vpo_ray.stages.tally import Tally, by_reason

Ask = Callable[[str, dict[str, Any]], Awaitable[str]]

_NO_FAULT = (
    "The prompt was also asked to meet the conditions below, which are checked elsewhere. What they ask for, "
    "such as another language, few words or JSON, is no fault of it."
)

# How an answer begins that talks about the prompt in place of being it (VPO, figure 7: no "The
# video opens"; the rest is what chat models put in front).
_INTRODUCTION = re.compile(
    r"""["'*#\s]*(?:
        (?:in\ )?(?:the|this|our)\ (?:video|clip|scene|footage)\ (?:we\ see
            |(?:show|open|begin|start|feature|depict|capture|present)s?)\b
        | (?:sure|certainly|of\ course|absolutely|okay|ok)\b\s*[,.!:]
        | here(?:['’]s|\ is|\ are)\ (?:the|a|an|your|my)\ (?:\w+\ ){0,3}
            (?:prompt|version|rewrite|description)\b
        | (?:\w+\ ){0,2}prompt\s*:
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class Judgement:
    """A verdict, why, and the details that the prompt lacks and adds."""

    verdict: Verdict
    critique: str
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


class Judging:
    """Critique, refine when misaligned, judge the refined prompt; all on one engine."""

    name = "judge"

    def __init__(self, settings: Judge) -> None:
        self.settings = settings
        self.critique_prompt = read_prompt(settings.critique_prompt)
        self.refine_prompt = read_prompt(settings.refine_prompt)

    def wants(self, row: Row) -> bool:
        return row["prompt"] is not None and row["verdict"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        first = unmet_judgement(row.get("unmet") or [])
        conditions = Conditions.stored(row.get("conditions"))
        asked = row["query"], row["prompt"], row["candidate_id"]
        return {**row, **await self.review(*asked, chat, first, conditions)}

    async def review(
        self,
        query: str,
        prompt: str,
        identity: str,
        chat: Chat,
        first: Judgement | None = None,
        conditions: Conditions = NONE,
    ) -> Row:
        """The judge's columns for a prompt.

        Args:
            identity: with a question it makes that question's seed, so a rerun asks the same.
            first: what is known of the prompt already; the LLM is not asked for it then.
            conditions: what the prompt was asked to meet, and a refined one has to.

        Raises:
            AnswerError: an answer is no verdict, or no refined prompt.
            ChatError: the LLM gives no answer.
        """
        ask = partial(self._ask, chat, identity)
        first = first or await self._critique(query, prompt, ask, conditions)
        row: Row = {
            "verdict": first.verdict,
            "critique": first.critique,
            "missing": first.missing,
            "added": first.added,
        }
        if first.verdict == "aligned" or not self.settings.refine:
            return row
        refined = await self._refine(query, prompt, first, ask, conditions)
        fault = refined_fault(refined, prompt, self.settings.word_limit)
        if fault is None and (unmet := conditions.unmet(refined)):
            fault = f"unmet: {kinds(unmet)}"
        if fault is not None:
            return {**row, "refined_prompt": refined, "refined_fault": fault}
        second = await self._critique(query, refined, ask, conditions)
        return {
            **row,
            "refined_prompt": refined,
            "refined_verdict": second.verdict,
            "refined_critique": second.critique,
            "refined_missing": second.missing,
            "refined_added": second.added,
        }

    async def _critique(self, query: str, prompt: str, ask: Ask, conditions: Conditions) -> Judgement:
        limits = self.settings
        details = {**_TEXTS, "items": string_schema(limits.detail_max_chars), "maxItems": limits.max_details}
        schema = {
            **_JUDGEMENT,
            "critique": string_schema(limits.critique_max_chars),
            "missing": details,
            "added": details,
        }
        text = fill(self.critique_prompt, query=query, prompt=prompt)
        text += f"\n\n{_NO_FAULT}\n{conditions.text()}" if conditions else ""
        return parse_judgement(await ask(text, schema))

    async def _refine(
        self, query: str, prompt: str, found: Judgement, ask: Ask, conditions: Conditions
    ) -> str:
        lines = [
            found.critique,
            *(f"missing: {detail}" for detail in found.missing),
            *(f"added: {detail}" for detail in found.added),
        ]
        text = fill(self.refine_prompt, query=query, prompt=prompt, critique="\n".join(lines))
        text += f"\n\n{conditions.text()}" if conditions else ""
        most = self.settings.prompt_max_chars
        kind = conditions.schema(most) or string_schema(most)
        return parse_prompt(await ask(text, {"prompt": kind}), conditions)

    async def _ask(self, chat: Chat, identity: str, text: str, properties: dict[str, Any]) -> str:
        sampling = Sampling(
            temperature=self.settings.temperature,
            max_tokens=self.settings.max_tokens,
            seed=seed_of("judge", identity, text),
        )
        messages = [{"role": "user", "content": text}]
        return (await chat.complete(messages, sampling, object_schema(properties))).text


def parse_judgement(text: str) -> Judgement:
    """Raises AnswerError for anything but an object with a known verdict, a critique and the lists
    of missing and added details."""
    value = parse_object(text, _JUDGEMENT)
    critique, missing, added = (value.get(name) for name in ("critique", "missing", "added"))
    for verdict in VERDICTS:
        if value.get("verdict") == verdict and isinstance(critique, str):
            if _texts(missing) and _texts(added):
                return Judgement(verdict, critique, missing, added)  # type: ignore[arg-type]
            raise AnswerError(f"the judge's answer names no missing and added details: {text[:200]!r}")
    raise AnswerError(
        f"the judge's answer has no critique and verdict of {', '.join(VERDICTS)}: {text[:200]!r}"
    )


def unmet_judgement(unmet: Sequence[str]) -> Judgement | None:
    """The judgement on a prompt that does not meet its conditions, which no LLM is asked about."""
    return Judgement("imprecise", f"The prompt does not meet: {'; '.join(unmet)}.") if unmet else None


def parse_prompt(text: str, conditions: Conditions = NONE) -> str:
    """The text `prompt` of an answer, or the object that conditions ask for as one. Raises AnswerError where
    there is none."""
    kind = conditions.schema() or {"type": "string"}
    value = parse_object(text, {"prompt": kind}).get("prompt")
    if isinstance(value, dict) and set(value) == set(conditions.fields):
        return conditions.shaped(json.dumps(value, ensure_ascii=False))
    if not isinstance(value, str):
        raise AnswerError(f"the answer has no text `prompt`: {text[:200]!r}")
    return value.strip()


def form_fault(prompt: str, word_limit: int) -> str | None:
    """Why a text has not the form of a prompt, or None."""
    if not prompt.strip():
        return "empty"
    if len(prompt.splitlines()) > 1:
        return "several paragraphs"
    if _INTRODUCTION.match(prompt):
        return "introductory phrase"
    if len(prompt.split()) > word_limit:
        return f"over {word_limit} words"
    return None


def refined_fault(refined: str, original: str, word_limit: int) -> str | None:
    """Why a refined prompt cannot be a chosen one, or None."""
    if refined and " ".join(refined.split()).casefold() == " ".join(original.split()).casefold():
        return "equal to the original"
    return form_fault(refined, word_limit)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_TEXTS = {"type": "array", "items": {"type": "string"}}
_JUDGEMENT = {
    "critique": {"type": "string"},
    "missing": _TEXTS,
    "added": _TEXTS,
    "verdict": {"type": "string", "enum": list(VERDICTS)},
}


def make(making: Making) -> Callable[[], Judging]:
    return partial(Judging, making.recipe.judge)


def facts(recipe: Recipe) -> Iterator[Fact]:
    yield from of_chat("judge", recipe.judge)
    yield from of_judge_prompts(recipe)


class JudgeTally(Tally):
    columns = ("refined_prompt", "refined_fault", "refined_verdict")

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.refined = self.refined_aligned = 0

    def add(self, row: Row) -> None:
        self.verdicts[row["verdict"] or "none"] += 1
        self.refined += row["refined_prompt"] is not None
        if row["refined_fault"] is not None:
            self.faults[row["refined_fault"]] += 1
        self.refined_aligned += row["refined_verdict"] == "aligned"

    def result(self) -> dict[str, Any]:
        return {
            "verdicts": by_reason(self.verdicts),
            "refined": self.refined,
            "refined_aligned": self.refined_aligned,
            "refined_faults": by_reason(self.faults),
        }


tally = JudgeTally
