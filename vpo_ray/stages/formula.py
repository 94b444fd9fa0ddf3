"""The recipe's formula over raw dimensions of rewards. Pure functions on rows and arrays.

`pair.by: formula`, the measure `formula` of evaluations and the endpoint's `best_of` compute it here, so that
they agree. Rows keep raw dimensions: a formula is applied when it is asked for, and stored nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpo_ray.recipe import Formula
from vpo_ray.records import Row

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Weighed:
    """What a formula makes of n rows.

    totals: [n], nan where a row is out.
    terms: [n, terms], what each term adds to the total; nan where a row is out.
    out: why a row has no total: a value is missing, or a gate is not passed. None where it has one.
    refused: the first threshold (`above` of a term) that a row does not pass; None where it passes all.
    """

    totals: Numbers
    terms: Numbers
    out: list[str | None]
    refused: list[str | None]


def raw_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a scored row: each reward by its name (the first is `reward`), and its dimensions behind
    it, such as `vlm.motion`. Empty where the row has no score."""
    if row.get("score") is None:
        return {}
    found = {}
    for reward in ({**row, "name": "reward"}, *(row.get("more_rewards") or ())):
        found[reward["name"]] = reward["score"]
        for dimension in reward["dimensions"] or ():
            found[f"{reward['name']}.{dimension['name']}"] = dimension["score"]
    return found


def value_matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Numbers:
    """[rows, names]: values of `raw_values`, nan where there is none or it is not finite. `vlm.score` is the
    score of vlm, unless that has a dimension of this name."""
    found = np.full((len(rows), len(names)), np.nan)
    for column, name in enumerate(names):
        whole = name.removesuffix(".score")
        for number, row in enumerate(rows):
            value = row.get(name, row.get(whole))
            if value is not None:
                found[number, column] = value
    found[~np.isfinite(found)] = np.nan
    return found


def weigh(rows: Sequence[Mapping[str, float]], formula: Formula, groups: ArrayLike | None = None) -> Weighed:
    """Apply a formula, with the weights that hold in the end; see `Formula.at` for those of a round.

    Values are normalised among the rows of a group that are not out. Thresholds and gates look at raw values.

    Args:
        rows: values by name, see `raw_values`.
        groups: [n] whole numbers from 0, the same for the rows of one query. All are of one when unset.
    """
    names = formula.names()
    values = value_matrix(rows, names)
    out, inside = _outside(values, names, formula), np.ones(len(rows), bool)
    inside[[number for number, reason in enumerate(out) if reason is not None]] = False
    kinds = np.zeros(len(rows), np.int64) if groups is None else np.asarray(groups, np.int64)
    weights = np.array([term.weight_at(None) for term in formula.terms.values()])
    scales = np.array([term.scale for term in formula.terms.values()])
    terms = np.full((len(rows), len(formula.terms)), np.nan)
    raw = values[inside, : len(formula.terms)]
    terms[inside] = weights * _normalised(raw, kinds[inside], formula.normalise) * scales
    return Weighed(terms.sum(axis=1), terms, out, _refusals(values, formula))


def _outside(values: Numbers, names: Sequence[str], formula: Formula) -> list[str | None]:
    reasons: list[str | None] = [None] * len(values)
    for column, name in reversed(list(enumerate(names))):
        gate = formula.gates.get(name)
        if gate is not None and gate.below is not None:
            _mark(
                reasons, ~(values[:, column] < gate.below), f"formula.gates: {name} not below {gate.below:g}"
            )
        if gate is not None and gate.above is not None:
            _mark(
                reasons, ~(values[:, column] > gate.above), f"formula.gates: {name} not above {gate.above:g}"
            )
    for column, name in reversed(list(enumerate(names))):
        _mark(reasons, np.isnan(values[:, column]), f"formula: no reward gave {name}")
    return reasons


def _refusals(values: Numbers, formula: Formula) -> list[str | None]:
    reasons: list[str | None] = [None] * len(values)
    for column, (name, term) in reversed(list(enumerate(formula.terms.items()))):
        if term.above is not None:
            _mark(reasons, ~(values[:, column] > term.above), f"{name} not above {term.above:g}")
    return reasons


def _mark(reasons: list[str | None], where: NDArray[np.bool_], reason: str) -> None:
    for number in np.flatnonzero(where):
        reasons[number] = reason


def _normalised(values: Numbers, groups: NDArray[np.int64], how: str) -> Numbers:
    if how == "none" or not len(values):
        return values
    if how == "rank":
        ranks = np.stack([group_ranks(column, groups) for column in values.T], axis=1)
        last = np.bincount(groups)[groups][:, None] - 1.0
        return np.where(last > 0, ranks / np.maximum(last, 1.0), 0.5)
    return np.stack([_zscores(column, groups) for column in values.T], axis=1)


def _zscores(values: Numbers, groups: NDArray[np.int64]) -> Numbers:
    """Less the group's mean, by its standard deviation (of the population); 0 where all are equal."""
    counts = np.maximum(np.bincount(groups), 1)
    far = values - (np.bincount(groups, values) / counts)[groups]
    deviation = np.sqrt(np.bincount(groups, far**2) / counts)[groups]
    low, high = _extremes(values, groups)
    # Rounding may leave a deviation where there is none.
    constant = (low == high)[groups] | (deviation == 0)
    return np.where(constant, 0.0, far / np.where(constant, 1.0, deviation))


def _extremes(values: Numbers, groups: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    size = int(groups.max()) + 1
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, groups, values)
    np.maximum.at(high, groups, values)
    return low, high


def group_ranks(values: ArrayLike, groups: ArrayLike) -> Numbers:
    """[n] and [n] -> [n]: the rank of each value within its group, from 0; equal ones share the mean."""
    given, kinds = np.asarray(values, np.float64), np.asarray(groups, np.int64)
    order = np.lexsort((given, kinds))
    v, g = given[order], kinds[order]
    numbers = np.arange(len(v))
    begins = np.r_[True, g[1:] != g[:-1]] if len(v) else np.zeros(0, bool)
    changes = begins | np.r_[True, v[1:] != v[:-1]] if len(v) else begins
    starts = np.flatnonzero(changes)
    middles = (starts + np.r_[starts[1:], len(v)] - 1) / 2
    ranks = middles[np.cumsum(changes) - 1] - np.maximum.accumulate(np.where(begins, numbers, 0))
    found = np.empty(len(v))
    found[order] = ranks
    return found


def rows_by_formula(rows: Sequence[Row], formula: Formula) -> tuple[list[Row], list[str]]:
    """Rows of one query with the score columns of the formula: its total, and its terms as dimensions.

    Answers stay those of `reward`.

    A row that is out has no score any more. `refused` of a row says which threshold it does not pass.

    Returns:
        The rows, and the reasons of those that are out.
    """
    scored = [row["score"] is not None and row["error"] is None for row in rows]
    values = [raw_values(row) for row, there in zip(rows, scored, strict=True) if there]
    weighed = weigh(values, formula)
    found, reasons, number = [], [], 0
    for row, there in zip(rows, scored, strict=True):
        if not there:
            found.append(row)
            continue
        reason, total = weighed.out[number], float(weighed.totals[number])
        if reason is not None:
            reasons.append(reason)
        parts = zip(formula.terms, weighed.terms[number].tolist(), strict=True)
        columns = {
            "score": None if reason is not None else total,
            "dimensions": [{"name": name, "score": part} for name, part in parts] if reason is None else None,
            "refused": weighed.refused[number],
        }
        found.append({**row, **columns})
        number += 1
    return found, reasons
