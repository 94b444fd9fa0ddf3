"""What the ledger counts of a stage's rows, beside how many there are: each stage has a Tally of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vpo_ray.records import Row

MAX_REASONS = 40


class Tally:
    """Counts nothing more; stages with something to count derive from it.

    Attributes:
        columns: of the table, that `add` and `add_failed` look at.
    """

    columns: Sequence[str] = ()

    def add(self, row: Row) -> str | None:
        """Count a row that the stage did not fail on. Returns why it ends here, or None where it goes on."""
        return None

    def add_failed(self, row: Row) -> None:
        """Count a row that the stage failed on."""

    def result(self) -> dict[str, Any]:
        """More keys of the stage's entry in the ledger."""
        return {}


def by_reason(counts: Counter[str]) -> dict[str, int]:
    """Counts, most frequent first; the tail is summed up so that a ledger stays small."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    tail = sum(n for _, n in ordered[MAX_REASONS:])
    return dict(ordered[:MAX_REASONS]) | ({"other reasons": tail} if tail else {})


def reason_of(error: str) -> str:
    """An error's first line without what differs from row to row, to count errors of one kind."""
    line = next((part.strip() for part in error.splitlines() if part.strip()), "no message")
    line = re.sub(r"(?<![\w.])(?:[a-z]+://|/)[^\s'\",;)]+", "PATH", line)
    line = re.sub(r"\b(?:0x[0-9a-f]+|(?=[a-f]*\d)[0-9a-f]{8,})\b", "ID", line, flags=re.IGNORECASE)
    line = re.sub(r"\d+(?:[.,]\d+)*", "N", line)
    return line if len(line) <= 120 else line[:119] + "…"
