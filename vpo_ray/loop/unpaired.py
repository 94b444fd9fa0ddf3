"""Why a query has no pair, from the feedback's rows one by one: what the ledger says of those without."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from vpo_ray.recipe import Formula, Pair
from vpo_ray.records import Row
from vpo_ray.stages.formula import raw_values, weigh
from vpo_ray.stages.pair import by_reward


@dataclass
class _Tally:
    """What decides whether a query can have a pair, kept small: one for every query."""

    candidates: int = 0
    failed: int = 0
    refined: int = 0
    skipped: str | None = None
    scores: tuple[float, ...] = ()
    values: tuple[tuple[float | None, ...], ...] = ()  # what the formula looks at, of each score
    prompts: frozenset[int] = frozenset()

    def add(self, row: Row, values: tuple[float | None, ...] | None) -> None:
        self.candidates += 1
        if row["error"] is not None:
            self.failed += 1
        elif row["refined_verdict"] == "aligned":
            self.refined += 1
        elif row["skipped"] is not None:
            self.skipped = row["skipped"]
        elif row["score"] is not None:
            self.scores += (row["score"],)
            self.prompts |= {hash(row["prompt"])}
            self.values += (values,) if values is not None else ()

    def why_no_pair(self, settings: Pair, formula: Formula | None) -> str:
        if self.failed == self.candidates:
            return "every candidate failed"
        if self.refined and not settings.text_per_query:
            return "text pairs are off (pair.text_per_query)"
        if self.refined:
            return "the refined prompt equals the original"
        if not self.scores and self.skipped:
            return f"no video: {self.skipped}"
        if not self.scores:
            return "no aligned candidate, no aligned refinement"
        if len(self.scores) == 1:
            return "one scored video only, no aligned refinement"
        if not settings.video_per_query:
            return "video pairs are off (pair.video_per_query)"
        if len(self.prompts) == 1:
            return "all scored prompts are the same"
        if formula is not None:
            return self._by_formula(settings, formula)
        return _by_scores(self.scores, settings)

    def _by_formula(self, settings: Pair, formula: Formula) -> str:
        names = formula.names()
        rows = [dict(zip(names, values, strict=True)) for values in self.values]
        weighed = weigh([{n: v for n, v in row.items() if v is not None} for row in rows], formula)
        there = ~np.isnan(weighed.totals)
        if there.sum() < 2:
            most = Counter(reason for reason in weighed.out if reason is not None).most_common(1)[0][0]
            return f"fewer than two videos that the formula weighs: {most}"
        scores = tuple(weighed.totals[there].tolist())
        if max(scores) - min(scores) <= settings.margin:
            return f"all totals within the margin of {settings.margin:g}"
        best = sorted(np.flatnonzero(there).tolist(), key=lambda number: -weighed.totals[number])
        refused = [weighed.refused[number] for number in best[: settings.ranks]]
        if all(reason is not None for reason in refused):
            return f"no video may be chosen: {refused[0]}"
        return _by_scores(scores, settings)


def _by_scores(scores: tuple[float, ...], settings: Pair) -> str:
    if max(scores) - min(scores) <= settings.margin:
        return f"all scores within the margin of {settings.margin:g}"
    if settings.ranks is None and settings.max_words is None:
        return f"no candidate both over the margin and dominant by {settings.dominance}"
    return "no candidate both over the margin and fit to be chosen (dominance, ranks, words, thresholds)"


class PairCount:
    """Collects what the feedback says of each query.

    Attributes:
        columns: of the feedback, that `add` looks at.
    """

    def __init__(self, settings: Pair, formula: Formula | None) -> None:
        self.settings, self.formula = settings, formula if settings.by == "formula" else None
        self._tallies: defaultdict[str, _Tally] = defaultdict(_Tally)
        self.columns = ["query_id", "prompt", "refined_verdict", "skipped", "score", "error"]
        if settings.reward is not None or self.formula is not None:
            self.columns.append("more_rewards")
        self.columns += ["dimensions"] if self.formula is not None else []

    @property
    def queries(self) -> Set[str]:
        return self._tallies.keys()

    def add(self, row: Row) -> None:
        values = None
        if self.formula is not None and row["score"] is not None:
            found = raw_values(row)
            values = tuple(
                found.get(name, found.get(name.removesuffix(".score"))) for name in self.formula.names()
            )
        self._tallies[row["query_id"]].add(by_reward(row, self.settings.reward), values)

    def why_no_pair(self, paired: Set[str]) -> Counter[str]:
        """How many queries have no pair, by the reason."""
        return Counter(
            tally.why_no_pair(self.settings, self.formula)
            for query, tally in self._tallies.items()
            if query not in paired
        )
