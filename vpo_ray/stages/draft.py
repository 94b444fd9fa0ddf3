"""Draft: SFT data. A strong LLM writes a prompt for every query of the sft split, shown examples.

VPO 3.2: few-shot writing, critique, refinement of what is misaligned; and, beyond it, the refined
prompt is judged again. A row carries the whole trail; `target` is what the policy is to learn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Chat
from vpo_ray.files.input_files import InputError
from vpo_ray.prompts.conditions import Conditions
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Draft, Judge, Profile, Recipe, engine_arguments
from vpo_ray.records import Row, content_id, seed_of
from vpo_ray.stages.facts import Fact, content_fact, of_chat, of_judge_prompts, of_prompt
from vpo_ray.stages.few_shot import FewShot
from vpo_ray.stages.judge import Judgement, Judging, form_fault, parse_prompt, unmet_judgement
from vpo_ray.stages.profiles import profiled
from vpo_ray.stages.spec import Making, draft_model
from vpo_ray.stages.tally import Tally, by_reason
from vpo_ray.storage.sft_data import sft_rows


def draft_row(
    query: Row, key: str, model: str, seed: int, profiles: Mapping[str, Profile] | None = None
) -> Row:
    """The DRAFT row of one Query row, before anything is written.

    Args:
        key: what the drafts are made with (see `draft_key`).
        seed: the recipe's seed.
        profiles: the recipe's, of which the query may have one.
    """
    asked = profiled(query, profiles or {}, seed)
    told = [Conditions.stored(asked["conditions"]).text()] if asked.get("conditions") else []
    identity = content_id("draft", query["query_id"], key, model, seed, *told)
    return {
        "draft_id": identity,
        "query_id": query["query_id"],
        "query": query["query"],
        "image": query.get("image"),
        "unsafe": query["unsafe"],
        "seed": seed_of("draft", identity),
        "model": model,
        **asked,
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
        self.few_shot = FewShot(settings, settings.prompt, examples, judge.prompt_max_chars)
        self.judging = Judging(judge)

    def wants(self, row: Row) -> bool:
        return row["prompt"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        conditions = Conditions.stored(row.get("conditions"))
        prompt = parse_prompt((await self.few_shot.ask(row, chat, conditions)).text, conditions)
        # What can be counted, the LLM is not asked about.
        fault = form_fault(prompt, self.judging.settings.word_limit)
        known = Judgement("imprecise", f"The prompt has the wrong form: {fault}.") if fault else None
        known = known or unmet_judgement(conditions.unmet(prompt))
        review = await self.judging.review(row["query"], prompt, row["draft_id"], chat, known, conditions)
        shown = [example["query_id"] for example in self.few_shot.shown(row)]
        row = {**row, "examples": shown, "prompt": prompt, **review}
        return {**row, **_outcome(row)}


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
