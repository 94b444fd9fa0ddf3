"""Statistics of an evaluation: means and shares with intervals, paired differences, tests.

Pure functions on numpy arrays. Rows of an array are queries, always in the same order; columns are the seeds
of a query; NaN is an absent value. Queries are what is sampled, so that all seeds of a query are resampled
together, and all policies are paired by query. What cannot be known from the values at hand is None, and a
`note` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, isnan, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Answer = Literal["a", "b", "tie"]

_BLOCK = 2**21  # weights that are in memory as float64 at a time: 16 MB
_KEPT = 2**29  # weights, a byte each, that are kept between calls
_STEPS = 2.0**30  # of the grid that values are rounded to


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate over `n` queries, with its standard error and confidence interval.

    `value` is None without queries; the others are None where they are not known, and `note` says why.
    """

    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """The mean of b - a over the queries that both have, and on how many of them b wins."""

    win: int = 0
    tie: int = 0
    loss: int = 0
    p: float | None = None  # exact sign test of wins against losses, two-sided
    smallest_detectable: float | None = None  # see the function


@dataclass(frozen=True, slots=True)
class VarianceParts:
    """Variance of a value by its query, and by its seed within a query. None: it takes more of them."""

    queries: float | None
    seeds: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree on `n` items that at least two of them rated."""

    alpha: float | None  # Krippendorff's, nominal: 1 full, 0 as by chance. None: nothing to disagree about
    share: float | None  # of the pairs of votes on one item that are equal
    n: int


class Resamples:
    """Bootstrap resamples of n queries, as how often each query is drawn. All columns share them.

    Takes n × resamples bytes while these are at most 512 MB (10,000 resamples of 53,000 queries); with more,
    the weights are drawn again at each use. Same arguments, same weights. Values are rounded to a grid of
    2^31 steps over a column's range, so that sums are whole numbers below 2^53 (up to 8 million queries):
    they are exact, and do not depend on threads, on the processor or on the columns beside them.

    Raises ValueError where n or resamples is below 1.
    """

    def __init__(self, n: int, resamples: int = 10_000, seed: int = 0) -> None:
        if n < 1 or resamples < 1:
            raise ValueError(f"{resamples} resamples of {n} queries: both are at least 1")
        self.n, self.resamples, self.seed = n, resamples, seed
        self._kept = list(self._drawn()) if n * resamples <= _KEPT else None

    def _drawn(self) -> Iterator[NDArray[np.uint8]]:
        rows = max(1, _BLOCK // self.n)
        for number, start in enumerate(range(0, self.resamples, rows)):
            rng = np.random.default_rng([self.seed, number])
            shape = min(rows, self.resamples - start), self.n
            cells = rng.integers(0, self.n, shape) + np.arange(shape[0])[:, None] * self.n
            # A query is drawn about once; 256 times has a probability below 1e-500.
            yield np.bincount(cells.ravel(), minlength=shape[0] * shape[1]).astype(np.uint8).reshape(shape)

    def means(self, matrix: ArrayLike) -> Floats:
        """[n queries, columns] -> [resamples, columns]: each column's mean of the queries that it has.

        NaN where a resample has none of them. Raises ValueError for another n and for infinite values.
        """
        values = _finite(matrix)
        if values.ndim != 2 or len(values) != self.n:
            raise ValueError(f"resamples of {self.n} queries, values of shape {values.shape}")
        present = ~np.isnan(values)
        filled = np.where(present, values, np.nan)
        with np.errstate(invalid="ignore"):
            low = np.min(filled, axis=0, where=present, initial=np.inf)
            high = np.max(filled, axis=0, where=present, initial=-np.inf)
            middle, half = (low + high) / 2, (high - low) / 2
        half = np.where(half > 0, half, 1.0)
        grid = np.where(present, np.rint((filled - middle) / half * _STEPS), 0.0)
        whole = bool(present.all())
        sums = np.empty((self.resamples, values.shape[1]))
        start = 0
        for block in self._kept if self._kept is not None else self._drawn():
            weights = block.astype(np.float64)
            rows = slice(start, start := start + len(block))
            with np.errstate(invalid="ignore"):
                sums[rows] = weights @ grid / (self.n if whole else weights @ present)
        return middle + sums / _STEPS * half


@lru_cache(maxsize=2)
def shared_resamples(n: int, resamples: int, seed: int) -> Resamples:
    """The resamples that all figures of a set of n queries share."""
    return Resamples(n, resamples, seed)


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if np.isinf(array).any():
        where = ", ".join(map(str, np.argwhere(np.isinf(array))[0]))
        raise ValueError(f"an infinite value at [{where}]: leave it out as NaN, or count it as the worst")
    return array


def _rounding(*arrays: Floats) -> float:
    """The largest difference of values so large that may come from rounding alone."""
    return 1e-12 * max(float(np.nanmax(np.abs(array), initial=0.0)) for array in arrays)


def _by_seed(values: ArrayLike) -> Floats:
    """[n] or [n, seeds] -> [n, seeds]."""
    array = _finite(values)
    return array[:, None] if array.ndim == 1 else array


def per_query(values: ArrayLike) -> Floats:
    """[n] or [n, seeds] -> [n]: the mean over the seeds that are there; NaN where there is none."""
    array = _by_seed(values)
    count = (~np.isnan(array)).sum(axis=1)
    return np.where(count > 0, np.nansum(array, axis=1) / np.maximum(count, 1), np.nan)


def too_few(value: float | None, n: int) -> Interval:
    """What is known of fewer than two queries."""
    return Interval(value, None, None, None, n, "one query only" if n else "no queries")


def _interval(values: Floats, rounding: float, confidence: float, resamples: int, seed: int) -> Interval:
    """Of the mean of values [n], which are equal where they differ by `rounding` at most."""
    there = values[~np.isnan(values)]
    n = len(there)
    if n < 2:
        return too_few(float(there[0]) if n else None, n)
    mean = float(there.mean())
    if np.ptp(there) <= rounding:
        return Interval(mean, None, None, None, n, "constant")
    means = shared_resamples(len(values), resamples, seed).means(values[:, None])
    low, high = np.nanquantile(means[:, 0], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(there.std(ddof=1)) / sqrt(n), float(low), float(high), n)


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean over queries of a query's mean over seeds, with a percentile bootstrap interval over queries.

    values: [n] or [n, seeds], NaN for absent. `stderr` is s / √n of the queries' means. Raises ValueError for
    infinite values.
    """
    each = per_query(values)
    return _interval(each, _rounding(each), confidence, resamples, seed)


def difference(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    similar: float = 0.0,
    higher_is_better: bool = True,
) -> Difference:
    """How b differs from a, paired by query and seed; pairs of which one is absent are left out.

    a, b: [n] or [n, seeds], NaN for absent. b wins a query whose mean difference is at least `similar` in the
    better direction; the value is b - a whichever is better. Of zeros and ones the sign test is McNemar's.
    Raises ValueError for infinite values and for arrays of different shapes.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise ValueError(f"paired values have one shape, these have {first.shape} and {second.shape}")
    rounding = _rounding(first, second)
    each = per_query(second - first)
    each[np.abs(each) <= rounding] = 0.0
    there = each[~np.isnan(each)]
    sign = np.sign(there) * (np.abs(there) >= similar - rounding) * (1 if higher_is_better else -1)
    win, loss, n = int((sign > 0).sum()), int((sign < 0).sum()), len(there)
    base = _interval(each, rounding, confidence, resamples, seed)
    note = base.note
    if n > 1 and not win + loss:
        note = f"all {n} queries tie"
    elif note == "constant":
        note = f"constant: every query differs by {base.value:g}"
    return Difference(
        base.value, base.stderr, base.low, base.high, n, note,
        win=win, tie=n - win - loss, loss=loss, p=sign_test(win, loss) if n > 1 else None,
        smallest_detectable=_detectable(there, confidence) if base.stderr is not None else None,
    )  # fmt: skip


def _detectable(differences: Floats, confidence: float) -> float:
    n = len(differences)
    if np.isin(differences, (-1, 0, 1)).all():
        # Of shares: McNemar's variance, the share of queries of which only one of the two has it.
        return smallest_detectable(sqrt(float(np.mean(differences**2))), n, confidence)
    return smallest_detectable(float(differences.std(ddof=1)), n, confidence)


def smallest_detectable(deviation: float, n: int, confidence: float = 0.95, power: float = 0.8) -> float:
    """The smallest mean difference that n queries show at this confidence with this power.

    (t of 1 - α/2 + t of power) × deviation / √n, with α = 1 - confidence, n - 1 degrees of freedom, and the
    standard deviation of the paired differences (the usual formula of sample sizes, solved for the
    difference). Of shares, √(share of queries on which the two policies differ), as in McNemar's test.
    Needs n > 1.
    """
    quantiles = stats.t.ppf([(1 + confidence) / 2, power], n - 1)
    return float(quantiles.sum() * deviation / sqrt(n))


def sign_test(win: int, loss: int) -> float | None:
    """Two-sided p of so many wins and losses if both are as likely; ties are left out. None without any."""
    return float(stats.binomtest(win, win + loss).pvalue) if win + loss else None


def mcnemar(a_only: int, b_only: int) -> float | None:
    """Exact McNemar test of two shares of the same queries, from those of which only one policy has it."""
    return sign_test(b_only, a_only)


def share_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A share of n independent queries with its Wilson interval; `stderr` is None at 0 and 1."""
    if n == 0:
        return too_few(None, 0)
    share = successes / n
    bounds = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    stderr = sqrt(share * (1 - share) / n) or None
    return Interval(share, stderr, float(bounds.low), float(bounds.high), n)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number (Holm 1979), in their order; None and NaN stay and do not count."""
    known = sorted((p, at) for at, p in enumerate(ps) if p is not None and not isnan(p))
    adjusted, highest = list(ps), 0.0
    for rank, (p, at) in enumerate(known):
        adjusted[at] = highest = max(highest, min(1.0, p * (len(known) - rank)))
    return adjusted


def both_orders(first: str | None, second: str | None) -> Answer | None:
    """What a judge prefers that was asked in both orders: a win only where both answers agree, else a tie.

    `first` answers where a was shown first, `second` where b was. Both name the place, as rows of COMPARISON
    do: "a" is what was shown first, "b" what was shown second. None where an answer is missing.
    """
    if first is None or second is None:
        return None
    if (first, second) == ("a", "b"):
        return "a"
    return "b" if (first, second) == ("b", "a") else "tie"


def flip_rate(answers: Iterable[tuple[str | None, str | None]]) -> float | None:
    """Share of pairs, as `both_orders` takes them, whose answer changes with the order; None without any."""
    pairs = [pair for pair in answers if None not in pair]
    same = {("a", "b"), ("b", "a"), ("tie", "tie")}
    return sum(pair not in same for pair in pairs) / len(pairs) if pairs else None


def variance_parts(values: ArrayLike) -> VarianceParts:
    """Variance between queries and between seeds of a query, of values [n queries, seeds], NaN for absent.

    One-way random effects by analysis of variance: seeds = MSW, queries = (MSB - MSW) / m, at least 0, with
    m = (N - Σ mᵢ² / N) / (n - 1) for mᵢ seeds of query i and N values in all (Searle, Variance Components,
    1992, chapter 3). Both are None with one seed a query; `queries` is, with one query.
    """
    array = _by_seed(values)
    array = array[(~np.isnan(array)).any(axis=1)]
    counts = (~np.isnan(array)).sum(axis=1)
    n, total = len(array), int(counts.sum())
    if total == n:
        return VarianceParts(None, None)
    means = per_query(array)
    within = float(np.nansum((array - means[:, None]) ** 2)) / (total - n)
    if n < 2:
        return VarianceParts(None, within)
    overall = float(np.nansum(array)) / total
    between = float((counts * (means - overall) ** 2).sum()) / (n - 1)
    typical = (total - float((counts**2).sum()) / total) / (n - 1)
    return VarianceParts(max(0.0, (between - within) / typical), within)


def agreement(votes: Iterable[Sequence[Any]]) -> Agreement:
    """Raters' agreement: an item's votes by row, in any number and order, None where a rater has none.

    Krippendorff's alpha for nominal data (Content Analysis, chapter 11): 1 - observed / expected
    disagreement, where an item of m votes has the weight of m votes, whatever its number of pairs.
    """
    items = [Counter(vote for vote in row if vote is not None) for row in votes]
    items = [item for item in items if item.total() > 1]
    if not items:
        return Agreement(None, None, 0)
    equal = [sum(comb(count, 2) for count in item.values()) for item in items]
    pairs = [comb(item.total(), 2) for item in items]
    answers: Counter[Any] = sum(items, Counter())
    total = answers.total()
    # Twice the pairs over m - 1 is each vote's expected number of partners.
    observed = sum(2 * (p - e) / (i.total() - 1) for p, e, i in zip(pairs, equal, items, strict=True)) / total
    expected = 1 - sum(count * (count - 1) for count in answers.values()) / (total * (total - 1))
    return Agreement(1 - observed / expected if expected else None, sum(equal) / sum(pairs), len(items))
