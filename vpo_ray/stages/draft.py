"""Draft: SFT data. A strong LLM writes a prompt for every query of the sft split, shown examples.

VPO 3.2: few-shot writing, critique, refinement of what is misaligned; and, beyond it, the refined
prompt is judged again. A row carries the whole trail; `target` is what the policy is to learn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat, Sampling
from vpo_ray.files.input_files import InputError
from vpo_ray.prompts.answers import object_schema, string_schema
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Draft, Judge, Recipe, engine_arguments
from vpo_ray.records import Row, content_id, seed_of
from vpo_ray.stages.facts import Fact, content_fact, of_chat, of_judge_prompts, of_prompt
from vpo_ray.stages.judge import Judgement, Judging, form_fault, parse_prompt
from vpo_ray.stages.spec import Making, draft_model
from vpo_ray.stages.tally import Tally, by_reason
from vpo_ray.storage.sft_data import sft_rows

EXAMPLES = "{examples}"
_EXAMPLE = "<request>{query}</request>\n<prompt>{prompt}</prompt>"


def draft_row(query: Row, key: str, model: str, seed: int) -> Row:
    """The DRAFT row of one Query row, before anything is written.

    Args:
        key: what the drafts are made with (see `draft_key`).
        seed: the recipe's seed.
    """
    identity = content_id("draft", query["query_id"], key, model, seed)
    return {
        "draft_id": identity,
        "query_id": query["query_id"],
        "query": query["query"],
        "unsafe": query["unsafe"],
        "seed": seed_of("draft", identity),
        "model": model,
    }


def draft_key(settings: Draft, judge: Judge, examples: Sequence[Row]) -> str:
    """The identity of how drafts are made: settings, wording and examples."""
    prompts = [read_prompt(n) for n in (settings.prompt, judge.critique_prompt, judge.refine_prompt)]
    llm = settings.llm or judge
    template = [model.chat_template_kwargs for model in (llm, judge)]
    engine = engine_arguments(llm.engine.engine_kwargs, llm.engine.env)
    asked = {"temperature", "max_tokens", "critique_max_chars", "prompt_max_chars", "word_limit"}
    return content_id(
        settings.model_dump(include={"shots", "temperature", "max_tokens"}),
        judge.model_dump(include=asked),
        prompts,
        [[row["query"], row["prompt"]] for row in examples],
        *([template] if any(template) else []),
        *([engine] if engine else []),
        *([[llm.backend, llm.options]] if llm.is_plugin else []),
        digits=16,
    )


class Drafter:
    """Writes, checks and repairs one prompt; all on one engine.

    Args:
        judge: whose prompts and limits check the draft.
        examples: rows with `query_id`, `query` and `prompt`.
    """

    name = "draft"

    def __init__(self, settings: Draft, judge: Judge, examples: Sequence[Row]) -> None:
        self.settings, self.examples = settings, examples
        self.prompt = read_prompt(settings.prompt)
        self.judging = Judging(judge)

    def wants(self, row: Row) -> bool:
        return row["prompt"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        limits = self.judging.settings
        shown = self._shown(row)
        block = "\n\n".join(fill(_EXAMPLE, query=e["query"], prompt=e["prompt"]) for e in shown)
        text = fill(self.prompt, {"examples": block}, query=row["query"])
        sampling = Sampling(
            temperature=self.settings.temperature, max_tokens=self.settings.max_tokens, seed=row["seed"]
        )
        schema = object_schema({"prompt": string_schema(limits.prompt_max_chars)})
        answer = await chat.complete([{"role": "user", "content": text}], sampling, schema)
        prompt = parse_prompt(answer.text)
        # What can be counted, the LLM is not asked about.
        fault = form_fault(prompt, limits.word_limit)
        known = Judgement("imprecise", f"The prompt has the wrong form: {fault}.") if fault else None
        review = await self.judging.review(row["query"], prompt, row["draft_id"], chat, known)
        row = {**row, "examples": [example["query_id"] for example in shown], "prompt": prompt, **review}
        return {**row, **_outcome(row)}

    def _shown(self, row: Row) -> list[Row]:
        """Some examples, by the row's seed; never the answer to the query itself."""
        own = sum(example["query_id"] == row["query_id"] for example in self.examples)
        wanted = self.settings.shots + max(own, 1)
        chosen = random.Random(row["seed"]).sample(self.examples, min(wanted, len(self.examples)))
        return [example for example in chosen if example["query_id"] != row["query_id"]][
            : self.settings.shots
        ]


def _outcome(row: Row) -> dict[str, Any]:
    if row["verdict"] == "aligned":
        return {"target": row["prompt"]}
    if row.get("refined_verdict") == "aligned":
        return {"target": row["refined_prompt"]}
    if row.get("refined_prompt") is None:
        return {"fault": f"prompt {row['verdict']}"}
    if row.get("refined_fault") is not None:
        return {"fault": f"refined prompt: {row['refined_fault']}"}
    return {"fault": f"refined prompt still {row['refined_verdict']}"}


def make(making: Making) -> Callable[[], Drafter]:
    settings = making.recipe.draft
    assert settings is not None
    examples = list(sft_rows(settings.examples, "draft.examples"))
    return partial(Drafter, settings, making.recipe.judge, examples)


def facts(recipe: Recipe) -> Iterator[Fact]:
    assert recipe.draft is not None
    yield from of_chat(*draft_model(recipe))
    yield from of_prompt("draft.prompt", recipe.draft.prompt)
    yield from of_judge_prompts(recipe)
    try:
        rows = [[row["query"], row["prompt"]] for row in sft_rows(recipe.draft.examples, "draft.examples")]
    except InputError:
        return
    yield "draft.examples", content_fact(rows)


class DraftTally(Tally):
    """A draft without a target ends here, with its fault."""

    columns = ("verdict", "refined_prompt", "target", "fault")

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.refined = 0

    def add(self, row: Row) -> str | None:
        self.add_failed(row)
        return (row["fault"] or "no target") if row["target"] is None else None

    def add_failed(self, row: Row) -> None:
        self.verdicts[row["verdict"] or "none"] += 1
        self.refined += row["refined_prompt"] is not None

    def result(self) -> dict[str, Any]:
        return {"verdicts": by_reason(self.verdicts), "refined": self.refined}


tally = DraftTally
