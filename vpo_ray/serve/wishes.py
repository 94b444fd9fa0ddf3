"""What a request wants of its prompt, beyond the query: words that stay or stay away, a length, a
language, JSON, no change of a long query; and how much work it is worth.

A policy that learnt such conditions (`recipe.profiles`) is told, in the words that it learnt. Its prompts are
checked in any case; where none meets the wishes it is asked once more, and the answer names what is still
unmet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vpo_ray.prompts.conditions import Conditions
from vpo_ray.prompts.words import word_count

Effort = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Wishes:
    """
    Args:
        keep: texts that the prompt has in it, in any case.
        max_words: the most words of the prompt; characters of a script without spaces count as words.
        skip_if_words: a query of so many words or more is left as it is.
        avoid: words and phrases that the prompt does not have, as a list of the safety gate has them.
        language: whose script the prompt is written in (`prompts.scripts`).
        fields: the prompt is a JSON object with a text for each of these.
        effort: low ranks no candidates, high ranks twice as many as medium, which does as the recipe says.
    """

    keep: tuple[str, ...] = ()
    max_words: int | None = None
    skip_if_words: int | None = None
    effort: Effort = "medium"
    avoid: tuple[str, ...] = ()
    language: str | None = None
    fields: tuple[str, ...] = ()

    @property
    def conditions(self) -> Conditions:
        """What a prompt is asked to meet."""
        return Conditions(self.language, self.max_words, self.keep, self.avoid, self.fields)

    @property
    def of_prompts(self) -> bool:
        """Whether a prompt has to be checked."""
        return bool(self.conditions)

    def skips(self, query: str) -> bool:
        return self.skip_if_words is not None and word_count(query) >= self.skip_if_words

    def unmet(self, prompt: str) -> list[str]:
        """What a prompt does not meet, such as `keep: red` or `max_words: 61`."""
        return self.conditions.unmet(prompt)

    def best(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that leave the least unmet, in their order."""
        left = {prompt: len(self.unmet(prompt)) for prompt in prompts}
        return [prompt for prompt in prompts if left[prompt] == min(left.values())]


NO_WISHES = Wishes()
