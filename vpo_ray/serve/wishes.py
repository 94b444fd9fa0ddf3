"""What a request wants of its prompt, beyond the query: words that stay or stay away, a length, a
language, no change of a long query; and how much work it is worth.

The policy is not told. Its prompts are checked; where none meets the wishes it is asked once more, and the
answer names what is still unmet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from unicodedata import normalize

from vpo_ray.keywords import KeywordList
from vpo_ray.prompts.scripts import in_script_of
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
        effort: low ranks no candidates, high ranks twice as many as medium, which does as the recipe says.
    """

    keep: tuple[str, ...] = ()
    max_words: int | None = None
    skip_if_words: int | None = None
    effort: Effort = "medium"
    avoid: tuple[str, ...] = ()
    language: str | None = None

    @property
    def of_prompts(self) -> bool:
        """Whether a prompt has to be checked."""
        return bool(self.keep or self.avoid or self.language) or self.max_words is not None

    def skips(self, query: str) -> bool:
        return self.skip_if_words is not None and word_count(query) >= self.skip_if_words

    def unmet(self, prompt: str) -> list[str]:
        """What a prompt does not meet, such as `keep: red` or `max_words: 61`."""
        text = _plain(prompt)
        found = [f"keep: {term}" for term in self.keep if _plain(term) not in text]
        found += [f"avoid: {term}" for term in self.avoid if KeywordList([term]).find(prompt) is not None]
        if self.language is not None and not in_script_of(self.language, prompt):
            found.append(f"language: {self.language}")
        count = word_count(prompt)
        if self.max_words is not None and count > self.max_words:
            found.append(f"max_words: {count}")
        return found

    def best(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that leave the least unmet, in their order."""
        left = {prompt: len(self.unmet(prompt)) for prompt in prompts}
        return [prompt for prompt in prompts if left[prompt] == min(left.values())]


NO_WISHES = Wishes()


def _plain(text: str) -> str:
    return " ".join(normalize("NFKC", text).casefold().split())
