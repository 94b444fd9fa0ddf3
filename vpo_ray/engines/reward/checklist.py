"""The checklist: yes/no questions about a video with weights, and the score of the answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from vpo_ray import recipe
from vpo_ray.files.text_files import TextFileError, lines, read_text
from vpo_ray.prompts.material import in_quotes, quoted
from vpo_ray.recipe.file import load_yaml

SLOT = "[[prompt]]"
_SLOT = re.compile(in_quotes(SLOT))
Convention = Literal["sum01", "mean_pm1"]


class ChecklistError(ValueError):
    """A checklist that cannot be used. The message names the file, the entry and the fix."""

    stops_run = True  # see stream/stops.py


@dataclass(frozen=True)
class Question:
    text: str
    weight: float
    dimension: str | None

    def ask(self, query: str) -> str:
        """The question with the user's query in its slot, if it has one, as VisionReward was trained. A slot
        in the query itself stays as text."""
        return self.text.replace(SLOT, query)

    def ask_quoted(self, query: str) -> str:
        """The question with the query as a JSON string in place of the slot and the quotation marks around
        it, so that no query can end the string. For models that were not trained on the question."""
        return _SLOT.sub(lambda _: quoted(query), self.text)


@dataclass(frozen=True)
class LoadedChecklist:
    questions: tuple[Question, ...]

    def score(self, yes: Sequence[bool], convention: Convention) -> tuple[float, dict[str, float]]:
        """The score of one answer per question, and each dimension's part of it.

        `sum01` adds the weights of the questions answered yes (VisionReward paper eq. 4, VPO);
        `mean_pm1` averages weight * (+1 for yes, -1 for no) over all n questions (VisionReward's
        script). With W the sum of all weights, mean_pm1 = (2 * sum01 - W) / n.
        """
        if len(yes) != len(self.questions):
            raise ValueError(f"{len(yes)} answers to {len(self.questions)} questions")
        parts: dict[str, list[float]] = {q.dimension: [] for q in self.questions if q.dimension is not None}
        values = []
        for question, answer in zip(self.questions, yes, strict=True):
            if convention == "sum01":
                value = question.weight * answer
            else:
                value = question.weight * (1 if answer else -1) / len(self.questions)
            values.append(value)
            if question.dimension is not None:
                parts[question.dimension].append(value)
        return math.fsum(values), {name: math.fsum(part) for name, part in parts.items()}


def load_checklist(settings: recipe.Checklist | None) -> LoadedChecklist:
    """Read the checklist of a recipe: our YAML, or published questions with their weights.

    Raises:
        ChecklistError: there is none, a file that cannot be read or parsed, unequal numbers of weights and
            questions, a weight that is not finite, a question in no dimension or in two, or a question
            of a dimension named alignment without the `[[prompt]]` slot.
    """
    if settings is None:
        raise ChecklistError("the reward has no checklist: name one in reward.checklist")
    questions = _from_yaml(settings.file) if settings.file else _from_published(settings)
    where = settings.file or settings.questions
    if not questions:
        raise ChecklistError(f"{where}: no questions in it")
    for number, question in enumerate(questions, 1):
        if (question.dimension or "").casefold() == "alignment" and SLOT not in question.text:
            raise ChecklistError(
                f"{where}: question {number} belongs to the dimension {question.dimension}, "
                f"but has no {SLOT} slot for the user's query: {question.text!r}"
            )
    return LoadedChecklist(tuple(questions))


def _from_yaml(path: str) -> list[Question]:
    try:
        tree = load_yaml(_read(path))
    except yaml.YAMLError as error:
        raise ChecklistError(f"{path}: not YAML: {error}") from error
    entries = tree.get("questions") if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise ChecklistError(f"{path}: needs a list `questions` of {{question, weight, dimension}}")
    return [_entry(entry, f"{path}: question {number}") for number, entry in enumerate(entries, 1)]


def _entry(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict) or not entry.keys() <= {"question", "weight", "dimension"}:
        raise ChecklistError(
            f"{where}: write it as {{question: ..., weight: ..., dimension: ...}}, not {entry!r}"
        )
    text, dimension = entry.get("question"), entry.get("dimension")
    if not isinstance(text, str) or not text.strip():
        raise ChecklistError(f"{where}: its text is {text!r}")
    if dimension is not None and not isinstance(dimension, str):
        raise ChecklistError(f"{where}: its dimension is {dimension!r}, not a name")
    return Question(text, _weight(entry.get("weight"), where), dimension)


def _from_published(settings: recipe.Checklist) -> list[Question]:
    assert settings.questions is not None
    assert settings.weights is not None
    found = lines(_read(settings.questions), keepends=not settings.strip_newlines)
    texts = [line for line in found if line.strip()]
    try:
        weights = json.loads(_read(settings.weights))
    except ValueError as error:
        raise ChecklistError(f"{settings.weights}: not JSON: {error}") from error
    if not isinstance(weights, list):
        raise ChecklistError(
            f"{settings.weights}: must be a JSON list of numbers, is a {type(weights).__name__}"
        )
    if len(weights) != len(texts):
        raise ChecklistError(
            f"{settings.weights} has {len(weights)} weights, {settings.questions} "
            f"has {len(texts)} questions: give one each (0 where only pairing counts)"
        )
    names = _dimensions(settings.dimensions, len(texts))
    return [
        Question(text, _weight(weight, f"{settings.weights}: weight {i}"), names.get(i))
        for i, (text, weight) in enumerate(zip(texts, weights, strict=True), 1)
    ]


def _weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ChecklistError(f"{where}: the weight is {value!r}, not a finite number")
    return float(value)


def _dimensions(ranges: dict[str, str], count: int) -> dict[int, str]:
    """Question number to dimension, from ranges such as "1-4, 36-37"; empty when none are given."""
    names: dict[int, str] = {}
    for name, text in ranges.items():
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= count:
                raise ChecklistError(
                    f"dimensions.{name}: {part.strip()!r} is no range of questions 1 to {count}, such as 5-8"
                )
            for number in range(first, last + 1):
                if number in names:
                    raise ChecklistError(
                        f"dimensions.{name}: question {number} belongs to {names[number]} already"
                    )
                names[number] = name
    absent = [number for number in range(1, count + 1) if number not in names]
    if ranges and absent:
        raise ChecklistError(f"dimensions: question {', '.join(map(str, absent))} is in none; add it to one")
    return names


def _read(source: str) -> str:
    try:
        return read_text(source)
    except TextFileError as error:
        raise ChecklistError(f"cannot read the checklist {source}: {error.reason}") from error
