"""Rewrite: what an evaluated policy that is an LLM, few-shot or behind an endpoint, writes for a query.

The recipe of the run directory has that policy alone in `evaluate.policies` (see
`spec.rewriting_policy`). Its rows are candidates, which the chain "generation" takes from the judge on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from vpo_ray.engines.chat import Answer, Chat, Sampling
from vpo_ray.files.input_files import InputError
from vpo_ray.prompts.conditions import Conditions, conditioned
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.prompts.thoughts import UnclosedThought, without_thoughts
from vpo_ray.recipe import EvaluatedPolicy, Recipe
from vpo_ray.records import Row, failed
from vpo_ray.stages.facts import Fact, content_fact, of_chat, of_prompt
from vpo_ray.stages.few_shot import FewShot
from vpo_ray.stages.judge import parse_prompt
from vpo_ray.stages.spec import Making, rewriter, rewriting_policy
from vpo_ray.stages.tally import Tally
from vpo_ray.storage.sft_data import sft_rows

NAME = "rewrite"


def as_candidate(row: Row) -> Row:
    """A row of the stage as the sample stage would have left it."""
    return {**row, "error_stage": "sample"} if row["error_stage"] == NAME else row


class Rewriter:
    """Asks the policy for one prompt.

    Args:
        examples: what a few-shot policy is shown; see `FewShot`.
        max_chars: of the prompt of a few-shot policy.
    """

    name = NAME

    def __init__(self, policy: EvaluatedPolicy, examples: Sequence[Row], max_chars: int) -> None:
        self.policy, self.few_shot = policy, None
        if policy.kind == "few_shot":
            self.few_shot = FewShot(policy, policy.prompt or "builtin:draft", examples, max_chars)
        self.template = read_prompt(policy.prompt) if policy.prompt is not None else None

    def wants(self, row: Row) -> bool:
        return row["prompt"] is None and row["error"] is None

    async def __call__(self, row: Row, chat: Chat) -> Row:
        """Raises ChatError where there is no answer (Refusal where it was declined), AnswerError for one
        without a prompt."""
        conditions = Conditions.stored(row.get("conditions"))
        try:
            if self.few_shot is not None:
                answer = await self.few_shot.ask(row, chat, conditions)
                prompt = parse_prompt(answer.text, conditions)
            else:
                answer = await self._ask(row, chat, conditions)
                prompt = without_thoughts(answer.text).strip()
        except UnclosedThought as error:
            return failed(row, self.name, f"UnclosedThought: {error}")
        if not prompt:
            return failed(row, self.name, "the policy's answer is empty")
        prompt = conditions.shaped(prompt)
        return {
            **row,
            "prompt": prompt,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }

    async def _ask(self, row: Row, chat: Chat, conditions: Conditions) -> Answer:
        query = conditioned(row["query"], conditions)
        text = query if self.template is None else fill(self.template, query=query)
        sampling = Sampling(self.policy.temperature, self.policy.max_tokens, row["seed"])
        return await chat.complete([{"role": "user", "content": text}], sampling, conditions.schema())


def make(making: Making) -> Callable[[], Rewriter]:
    recipe = making.recipe
    _, policy = rewriting_policy(recipe)
    return partial(Rewriter, policy, _examples(recipe), recipe.judge.prompt_max_chars)


def _examples(recipe: Recipe) -> list[Row]:
    name, policy = rewriting_policy(recipe)
    if policy.kind != "few_shot":
        return []
    if policy.examples is not None:
        return list(sft_rows(policy.examples, f"evaluate.policies.{name}.examples"))
    assert recipe.draft is not None, "see Recipe"
    return list(sft_rows(recipe.draft.examples, "draft.examples"))


def facts(recipe: Recipe) -> Iterator[Fact]:
    name, policy = rewriting_policy(recipe)
    yield from of_chat(*rewriter(recipe))
    template = policy.prompt or ("builtin:draft" if policy.kind == "few_shot" else None)
    if template is not None:
        yield from of_prompt(f"evaluate.policies.{name}.prompt", template)
    try:
        rows = [[row["query"], row["prompt"]] for row in _examples(recipe)]
    except InputError:
        return
    if rows:
        yield f"evaluate.policies.{name}.examples", content_fact(rows)


tally = Tally
