"""What a model of others gives for a batch: one result for each row, or a message that says what it gave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class ResultsError(ValueError):
    """A model gave something else than one result for each row of a batch."""


def one_for_each(given: Any, count: int, method: str) -> list[Any]:
    """The results as a list.

    Args:
        count: of the rows that were asked about.
        method: what gave the results, for the message.

    Raises:
        ResultsError: there is not one for each.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
        raise ResultsError(f"{method} gave {type(given).__name__}, and not a list of {count} results")
    found = list(given)
    if len(found) != count:
        raise ResultsError(f"{method} gave {len(found)} results for {count}; it gives one for each, in order")
    return found


def said_by(error: Exception) -> str:
    """What an exception says, as its row's error: also where it says nothing, or only a key."""
    text = str(error).strip()
    if text and not isinstance(error, LookupError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")
