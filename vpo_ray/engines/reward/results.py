"""What a reward gave, checked: one result for each video, and in each what its row's columns take.

A reward of others may give anything. What is no result costs its row, and a list of another length the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vpo_ray.engines.results import one_for_each
from vpo_ray.engines.reward import QuestionAnswer, RewardError, Scored

_MOST = 2**31 - 1  # of the column's int32


def checked_scores(given: Any, count: int, method: str) -> list[Scored | Exception]:
    """The results, with Python's own numbers and without dimensions that are None. One that is no Scored, or
    whose score is no finite number, which is above and below any other, becomes an error.

    Args:
        method: what gave them, for messages.

    Raises:
        ResultsError: there is not one for each of `count` videos.
    """
    return [_checked(result) for result in one_for_each(given, count, method)]


def _checked(result: Any) -> Scored | Exception:
    if isinstance(result, Exception):
        return result
    if not isinstance(result, Scored):
        return RewardError(f"its result is {_told(result)}, no Scored and no exception")
    try:
        return replace(
            result,
            answers=_answers(result.answers),
            dimensions=_dimensions(result.dimensions),
            score=_score(result.score),
        )
    except RewardError as error:
        return error


def _score(given: Any) -> float:
    score = _number(given)
    if score is None or not math.isfinite(score):
        raise RewardError(f"its score is {str(given)[:50]}, no finite number")
    return score


def _dimensions(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise RewardError(f"its dimensions are {_told(given)}, no dict of names and numbers")
    found = {}
    for name, value in given.items():
        if not isinstance(name, str) or any("\ud800" <= sign <= "\udfff" for sign in name):
            raise RewardError(f"the name of a dimension is {ascii(name)[:50]}, no text")
        if value is None:
            continue
        if (number := _number(value)) is None:
            raise RewardError(f"its dimension {name} is {str(value)[:50]!r}, no number")
        found[name] = number
    return found


def _answers(given: Any) -> list[QuestionAnswer]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise RewardError(f"its answers are {_told(given)}, no list of QuestionAnswer")
    return [_answer(answer) for answer in given]


def _answer(given: Any) -> QuestionAnswer:
    if not isinstance(given, QuestionAnswer):
        raise RewardError(f"one of its answers is {_told(given)}, no QuestionAnswer")
    question, probability = _number(given.question), _number(given.probability)
    if (
        question is None
        or not 0 <= question <= _MOST
        or probability is None
        or isinstance(given.yes, str | None)
    ):
        raise RewardError(f"one of its answers is {_told(given)}: a number, true or false, and a number")
    return QuestionAnswer(int(question), bool(given.yes), probability)


def _number(value: Any) -> float | None:
    """A number of any library's kind; None for what is none."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, of a whole tensor
        return None


def _told(value: Any) -> str:
    return f"{type(value).__name__} {ascii(value)[:80]}"
