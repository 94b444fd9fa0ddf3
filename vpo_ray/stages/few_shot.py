"""Few-shot writing: an LLM writes a prompt for a query, shown examples (VPO 3.2).

It makes the drafts of SFT data, and is a policy that an evaluation compares with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vpo_ray.engines.chat import Answer, Chat, Sampling
from vpo_ray.prompts.answers import object_schema, string_schema
from vpo_ray.prompts.conditions import NONE, Conditions
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Draft, EvaluatedPolicy
from vpo_ray.records import Row

EXAMPLES = "{examples}"
_EXAMPLE = "<request>{query}</request>\n<prompt>{prompt}</prompt>"


class FewShot:
    """Asks for one prompt, as a JSON object with the text `prompt`.

    Args:
        template: a prompt file with the slots `{examples}` and `{query}`.
        examples: rows with `query_id`, `query` and `prompt`.
        max_chars: of the prompt.
    """

    def __init__(
        self, settings: Draft | EvaluatedPolicy, template: str, examples: Sequence[Row], max_chars: int
    ) -> None:
        self.settings, self.examples = settings, examples
        self.template = read_prompt(template)
        self.max_chars = max_chars

    async def ask(self, row: Row, chat: Chat, conditions: Conditions = NONE) -> Answer:
        block = "\n\n".join(fill(_EXAMPLE, query=e["query"], prompt=e["prompt"]) for e in self.shown(row))
        text = fill(self.template, {"examples": block}, query=row["query"])
        sampling = Sampling(self.settings.temperature, self.settings.max_tokens, row["seed"])
        text += f"\n\n{conditions.text()}" if conditions else ""
        schema = object_schema({"prompt": conditions.schema(self.max_chars) or string_schema(self.max_chars)})
        return await chat.complete([{"role": "user", "content": text}], sampling, schema)

    def shown(self, row: Row) -> list[Row]:
        """Some examples, by the row's seed; never the answer to the query itself."""
        shots = self.settings.shots
        own = sum(example["query_id"] == row["query_id"] for example in self.examples)
        wanted = min(shots + max(own, 1), len(self.examples))
        chosen = random.Random(row["seed"]).sample(self.examples, wanted)
        return [example for example in chosen if example["query_id"] != row["query_id"]][:shots]
