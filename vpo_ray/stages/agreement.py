"""Do rewards agree? Spearman's rank correlation among the videos of a query, averaged over queries.

What is optimised is the order of a query's candidates, so that a correlation over all videos, which also sees
that some queries are easier, would say little. Pure functions on arrays; the ledger and the report show them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.stages.formula import Numbers, group_ranks, raw_values, value_matrix

CONFIDENCE = 0.95
# Below it two rewards want opposite things of a query's videos, and a sum of them rewards neither.
LEAST_AGREEMENT = 0.0


def spearman_by_query(a: ArrayLike, b: ArrayLike, queries: ArrayLike) -> Numbers:
    """[n], [n] and [n] -> [queries]: Spearman's correlation of a and b among the rows of each query.

    It is nan where fewer than two rows have both, or one is constant. Equal values share their mean rank.

    Args:
        queries: whole numbers from 0.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    groups = np.asarray(queries, np.int64)
    size = int(groups.max()) + 1 if len(groups) else 0
    both = np.isfinite(first) & np.isfinite(second)
    groups = groups[both]
    counts = np.maximum(np.bincount(groups, minlength=size), 1)
    far = []
    for values in (first[both], second[both]):
        ranks = group_ranks(values, groups)
        far.append(ranks - (np.bincount(groups, ranks, size) / counts)[groups])
    covariance, *variances = (
        np.bincount(groups, x * y, size) for x, y in ((far[0], far[1]), (far[0], far[0]), (far[1], far[1]))
    )
    # Ranks are multiples of a half: their variance is 0 or at least about 1 / rows.
    known = (variances[0] > 1e-9) & (variances[1] > 1e-9)
    scale = np.sqrt(np.where(known, variances[0] * variances[1], 1.0))
    return np.where(known, np.clip(covariance / scale, -1.0, 1.0), np.nan)


def mean_agreement(correlations: Numbers) -> dict[str, Any]:
    """The mean over queries with Student's interval: `mean`, `low`, `high`, and `queries` that have one. What
    too few queries do not tell is None."""
    from scipy.special import stdtrit

    known = correlations[~np.isnan(correlations)]
    n = len(known)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "queries": 0}
    mean = float(known.mean())
    if n == 1:
        return {"mean": round(mean, 4), "low": None, "high": None, "queries": 1}
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(known.std(ddof=1)) / sqrt(n)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "queries": n}


def compared(recipe: Recipe) -> dict[str, float]:
    """What is compared, with 1 where more is better and -1 where less is: the formula's terms, and rewards
    without a term; without a formula, the rewards. Nothing where there is one thing only."""
    terms = recipe.formula.terms if recipe.formula is not None else {}
    found = {}
    for name, term in terms.items():
        if worth := term.weight_at(None) * term.scale:
            found[name] = 1.0 if worth > 0 else -1.0
    rewards = ["reward", *recipe.more_rewards]
    found |= {name: 1.0 for name in rewards if not any(term.split(".")[0] == name for term in terms)}
    return found if len(found) > 1 else {}


def disagreements(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for each two that disagree: their whole interval is below LEAST_AGREEMENT."""
    for entry in found:
        if entry["high"] is not None and entry["high"] < LEAST_AGREEMENT:
            yield (
                f"{entry['a']} and {entry['b']} disagree: among a query's videos, their rank correlation is "
                f"{entry['mean']:.2f} on average ({CONFIDENCE:.0%} interval {entry['low']:.2f} to "
                f"{entry['high']:.2f}, {entry['queries']} queries), below {LEAST_AGREEMENT:g}: "
                "what one gains, the other loses. Look at such videos before their sum decides"
            )


@dataclass
class AgreementCount:
    """Collects the values of rows, a few numbers each, and says how far they agree."""

    signs: Mapping[str, float]
    columns: Sequence[str] = ("query_id", "dimensions", "score", "more_rewards", "error")
    _queries: dict[str, int] = field(default_factory=dict)
    _groups: list[int] = field(default_factory=list)
    _values: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        if row["score"] is None or row["error"] is not None:
            return
        values = value_matrix([raw_values(row)], list(self.signs))[0]
        self._groups.append(self._queries.setdefault(row["query_id"], len(self._queries)))
        self._values.append(tuple(values.tolist()))

    def result(self) -> list[dict[str, Any]]:
        """Each two with their `mean_agreement`, the least first."""
        if not self._values:
            return []
        values = np.array(self._values) * list(self.signs.values())
        found = [
            {"a": a, "b": b} | mean_agreement(spearman_by_query(values[:, i], values[:, j], self._groups))
            for (i, a), (j, b) in combinations(enumerate(self.signs), 2)
        ]
        return sorted(found, key=lambda entry: (entry["mean"] is None, entry["mean"], entry["a"], entry["b"]))
