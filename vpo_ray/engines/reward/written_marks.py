"""Marks that a model writes in its answer, read by a pattern or JSON key for each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vpo_ray.engines.reward import RewardError
from vpo_ray.prompts.answers import Schema, find_object, object_schema, schema_fault
from vpo_ray.prompts.thoughts import UnclosedThought, without_thoughts

if TYPE_CHECKING:
    from vpo_ray.engines.endpoint.completion import TokenLogprob

NUMBER = r"(-?\d+(?:\.\d+)?)"
# What tokenizers write for a space and a line's end.
_SPACES = str.maketrans("Ġ▁Ċ", "  \n")


class Marks:
    """The dimensions of an answer.

    Args:
        patterns: a regular expression for each name, with one group around the number; "": the name and a
            colon before it. The last match in the answer counts.
        in_json: the answer is a JSON object with the names as keys.
        scale: the least and the most that a mark may be.
    """

    def __init__(self, patterns: Mapping[str, str], in_json: bool, scale: tuple[int, int]) -> None:
        self.names, self.in_json, self.scale = list(patterns), in_json, scale
        usual = _of_json if in_json else _of_text
        self._patterns = {
            name: re.compile(pattern or usual(name), re.IGNORECASE) for name, pattern in patterns.items()
        }
        self.schema: Schema | None = None
        if in_json:
            number = {"type": "number", "minimum": scale[0], "maximum": scale[1]}
            self.schema = object_schema(dict.fromkeys(self.names, number))

    def read(self, text: str, tokens: Sequence[TokenLogprob] = ()) -> dict[str, float]:
        """The marks by name, each the expectation over its digits where `tokens` allow that.

        Args:
            tokens: of the whole answer; none where they are not known.

        Raises:
            RewardError: a mark is missing, no number or not on the scale.
        """
        try:
            said = without_thoughts(text)
        except UnclosedThought as error:
            raise RewardError(str(error)) from error
        written = self._in_object(text) if self.in_json else self._in_text(said)
        if missing := [name for name in self.names if name not in written]:
            raise RewardError(f"the answer has no {', '.join(missing)}: {_shown(said)}")
        found = {name: self._mark(name, written[name], said) for name in self.names}
        for name, value in self._expected(tokens, found).items():
            found[name] = value
        return found

    def _in_text(self, said: str) -> dict[str, Any]:
        matches = {name: list(pattern.finditer(said)) for name, pattern in self._patterns.items()}
        return {name: many[-1][1] for name, many in matches.items() if many}

    def _in_object(self, text: str) -> dict[str, Any]:
        # Numbers may be written as strings, where no schema was enforced.
        least = object_schema({name: {"type": ["number", "string"]} for name in self.names})
        loose = {**least, "additionalProperties": True}
        said = find_object(text, loose)
        if (fault := schema_fault(said, loose)) is not None:
            raise RewardError(
                f"the answer is no object with {', '.join(self.names)} ({fault}): {_shown(said)}"
            )
        values: dict[str, Any] = json.loads(said, strict=False)
        return values

    def _mark(self, name: str, value: Any, said: str) -> float:
        try:
            mark = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            mark = math.nan
        if not self.scale[0] <= mark <= self.scale[1]:  # not NaN
            scale = f"{self.scale[0]} to {self.scale[1]}"
            raise RewardError(f"the answer says {name} {str(value)[:50]}, not of {scale}: {_shown(said)}")
        return mark

    def _expected(self, tokens: Sequence[TokenLogprob], found: Mapping[str, float]) -> dict[str, float]:
        """The expectations of those marks that are one token, a digit.

        The digit that was chosen times its probability is no such thing: an unsure 5 would be below a sure 3.
        """
        if not 0 <= self.scale[0] < self.scale[1] <= 9:
            return {}
        texts = [token.token.translate(_SPACES) for token in tokens]
        whole, starts, at = "".join(texts), {}, 0
        for number, text in enumerate(texts):
            inside = text.strip(" \n\t\"'*")
            starts[at + text.find(inside)] = number, inside
            at += len(text)
        expected = {}
        for name, pattern in self._patterns.items():
            match = next(reversed(list(pattern.finditer(whole))), None)
            number, text = starts.get(match.start(1), (0, "")) if match is not None else (0, "")
            # Another number, or one of several tokens, is taken as it is written.
            if match is None or not text or text != match[1] or float(text) != found[name]:
                continue
            if (value := self._expectation(tokens[number].alternatives)) is not None:
                expected[name] = value
        return expected

    def _expectation(self, alternatives: Sequence[tuple[str, float]]) -> float | None:
        mass: dict[int, float] = {}
        for text, logprob in alternatives:
            digit = text.translate(_SPACES).strip(" \n\t\"'*")
            if digit.isascii() and digit.isdigit() and self.scale[0] <= int(digit) <= self.scale[1]:
                mass[int(digit)] = mass.get(int(digit), 0.0) + math.exp(logprob)
        total = sum(mass.values())
        return sum(digit * share for digit, share in mass.items()) / total if total else None


def _of_text(name: str) -> str:
    words = r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", name)))
    return rf"(?<!\w){words}(?!\w)[^:\n]*?:[\s*`\"_(\[]*{NUMBER}"


def _of_json(name: str) -> str:
    return rf"\"{re.escape(name)}\"\s*:\s*\"?{NUMBER}"


def _shown(text: str) -> str:
    """The end of an answer, where marks are."""
    return repr(text[-200:])
