"""Judge: an LLM critiques each candidate; a misaligned one is refined and judged again.

The query and the prompt under judgement are data: they enter the template as JSON strings with
`<` escaped, so that no text can close its delimiter. The answer is held to a JSON schema, so a
verdict always parses; an answer that does not is an error of this row, never a silent "no".
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.policy_prompt import read_prompt
from vpo_ray.recipe import Judge
from vpo_ray.records import VERDICTS, Row, Verdict, seed_of

Ask = Callable[[str, dict[str, Any]], Awaitable[str]]


class JudgeError(ValueError):
    """An answer of the judge that is no verdict."""


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    critique: str


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
        ask = partial(self._ask, chat, row)
        first = await self._critique(row["query"], row["prompt"], ask)
        row = {**row, "verdict": first.verdict, "critique": first.critique}
        if first.verdict == "aligned":
            return row
        refined = await self._refine(row["query"], row["prompt"], first.critique, ask)
        fault = refined_fault(refined, row["prompt"], self.settings.word_limit)
        if fault is not None:
            return {**row, "refined_prompt": refined, "refined_critique": f"not judged: {fault}"}
        second = await self._critique(row["query"], refined, ask)
        return {
            **row,
            "refined_prompt": refined,
            "refined_verdict": second.verdict,
            "refined_critique": second.critique,
        }

    async def _critique(self, query: str, prompt: str, ask: Ask) -> Judgement:
        text = fill(self.critique_prompt, query=query, prompt=prompt)
        critique = _string(self.settings.critique_max_chars)
        return parse_judgement(await ask(text, {"critique": critique, "verdict": {"enum": list(VERDICTS)}}))

    async def _refine(self, query: str, prompt: str, critique: str, ask: Ask) -> str:
        text = fill(self.refine_prompt, query=query, prompt=prompt, critique=critique)
        answer = await ask(text, {"prompt": _string(self.settings.prompt_max_chars)})
        value = _object(answer).get("prompt")
        if not isinstance(value, str):
            raise JudgeError(f"the refinement has no text `prompt`: {answer[:200]!r}")
        return value.strip()

    async def _ask(self, chat: Chat, row: Row, text: str, properties: dict[str, Any]) -> str:
        """One turn; its seed comes from the candidate and the question, so a rerun asks the same."""
        seed = seed_of("judge", row["candidate_id"], text)
        sampling = Sampling(
            temperature=self.settings.temperature, max_tokens=self.settings.max_tokens, seed=seed
        )
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return (await chat.complete([{"role": "user", "content": text}], sampling, schema)).text


def fill(template: str, **values: str) -> str:
    """Put values into `{name}` slots as JSON strings, in one pass, so that a value's own braces
    are never read as slots and nothing in it can end the string or open a tag."""
    encoded = {
        name: json.dumps(value, ensure_ascii=False).replace("<", "\\u003c") for name, value in values.items()
    }
    slots = re.compile("|".join(re.escape(f"{{{name}}}") for name in encoded))
    return slots.sub(lambda match: encoded[match[0][1:-1]], template)


def parse_judgement(text: str) -> Judgement:
    """Raises JudgeError for anything but an object with a known verdict and a critique."""
    value = _object(text)
    critique = value.get("critique")
    for verdict in VERDICTS:
        if value.get("verdict") == verdict and isinstance(critique, str):
            return Judgement(verdict, critique)
    raise JudgeError(
        f"the judge's answer has no critique and verdict of {', '.join(VERDICTS)}: {text[:200]!r}"
    )


def refined_fault(refined: str, original: str, word_limit: int) -> str | None:
    """Why a refined prompt cannot be a chosen one, or None."""
    if not refined:
        return "empty"
    if " ".join(refined.split()) == " ".join(original.split()):
        return "equal to the original"
    if len(refined.splitlines()) > 1:
        return "several paragraphs"
    if len(refined.split()) > word_limit:
        return f"over {word_limit} words"
    return None


def _object(text: str) -> dict[str, Any]:
    try:
        # Grammars let raw control characters into strings; they do no harm to a verdict.
        value = json.loads(text, strict=False)
        # An escape may hold half a character, which no table and no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise JudgeError(f"the judge's answer is not JSON ({error}): {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise JudgeError(f"the judge's answer is not an object: {text[:200]!r}")
    return value


def _string(max_chars: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": max_chars}
