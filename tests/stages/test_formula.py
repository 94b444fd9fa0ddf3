"""A formula weighs raw dimensions as it says, whatever the order, the grouping or what is missing."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vpo_ray.recipe import Formula
from vpo_ray.stages.formula import group_ranks, raw_values, rows_by_formula, weigh

NAMES = ["reward", "vlm.motion", "vlm.look"]
FINITE = st.floats(-100, 100).map(lambda value: round(value, 3))
VALUE = st.one_of(FINITE, st.sampled_from([0.0, 1.0, 2.0]))


def formula(**more: Any) -> Formula:
    terms = {"reward": {"weight": 2.0}, "vlm.motion": {"weight": -1.0}, "vlm.look": {"weight": 0.5}}
    return Formula.model_validate({"terms": terms, **more})


def row(**more: Any) -> dict[str, Any]:
    vlm = {
        "name": "vlm",
        "score": 4.0,
        "dimensions": [{"name": "motion", "score": 1.0}, {"name": "look", "score": 3.0}],
    }
    own = {"score": 2.0, "dimensions": [{"name": "alignment", "score": 0.5}], "answers": None, "error": None}
    return {**own, "more_rewards": [vlm], **more}


# What the terms are


def test_raw_values_have_the_names_of_an_evaluations_measures() -> None:
    assert raw_values(row()) == {
        "reward": 2.0, "reward.alignment": 0.5, "vlm": 4.0, "vlm.motion": 1.0, "vlm.look": 3.0,
    }  # fmt: skip
    assert raw_values(row(score=None)) == {}


def test_a_total_is_the_sum_of_weight_scale_and_value() -> None:
    scaled = formula(terms={"reward.score": 2, "vlm.motion": {"weight": -1, "scale": 10}, "vlm": 0.25})
    weighed = weigh([raw_values(row())], scaled)
    assert weighed.terms.tolist() == [[4.0, -10.0, 1.0]]
    assert weighed.totals.tolist() == [-5.0]
    assert (weighed.out, weighed.refused) == ([None], [None])


def test_a_dimension_called_score_goes_before_the_score() -> None:
    assert weigh([{"reward": 2.0, "reward.score": 5.0}], formula(terms={"reward.score": 1})).totals == [5.0]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_row_without_a_dimension_is_out_and_says_which(missing: float | None) -> None:
    values: list[dict[str, Any]] = [
        {"reward": 1.0, "vlm.motion": 1.0, "vlm.look": missing},
        raw_values(row()),
    ]
    weighed = weigh(values, formula())
    assert weighed.out == ["formula: no reward gave vlm.look", None]
    assert np.isnan(weighed.totals).tolist() == [True, False]


def test_a_gate_takes_a_row_out_and_a_threshold_only_refuses_to_choose_it() -> None:
    asked = formula(
        terms={"reward": {"weight": 1, "above": 1.5}, "vlm.look": {"weight": 1, "above": 2.0}},
        gates={"vlm.motion": {"above": 0.0, "below": 2.0}},
    )
    values = [
        {"reward": 1.5, "vlm.motion": 1.0, "vlm.look": 3.0},
        {"reward": 1.6, "vlm.motion": 0.0, "vlm.look": 3.0},
        {"reward": 1.6, "vlm.motion": 2.0, "vlm.look": 3.0},
        {"reward": 1.6, "vlm.motion": 1.0, "vlm.look": 2.0},
        {"reward": 1.6, "vlm.motion": 1.0, "vlm.look": 2.1},
    ]
    weighed = weigh(values, asked)
    assert weighed.out == [
        None, "formula.gates: vlm.motion not above 0", "formula.gates: vlm.motion not below 2", None, None,
    ]  # fmt: skip
    assert [weighed.refused[number] for number in (0, 3, 4)] == [
        "reward not above 1.5", "vlm.look not above 2", None,
    ]  # fmt: skip


# Rounds


@pytest.mark.parametrize(("round", "weight"), [(1, 1.0), (2, 5.0), (3, 7.0), (9, 7.0), (None, 7.0)])
def test_a_list_of_weights_is_by_round_and_the_last_one_holds(round: int | None, weight: float) -> None:
    curriculum = formula(terms={"reward": [1, 5, 7], "vlm.look": {"weight": 1}}).at(round)
    weighed = weigh([raw_values(row())], curriculum)
    assert weighed.totals == [2.0 * weight + 3.0]
    assert curriculum.at(1) == curriculum, "a formula of one round has one"


# Normalised among a query's videos


def plain(rows: list[dict[str, float]], asked: Formula) -> list[float]:
    """The formula written down a second time, for the rows of one query."""
    totals = [0.0] * len(rows)
    for name, term in asked.terms.items():
        values = [row[name] for row in rows]
        if asked.normalise == "zscore":
            spread = float(np.std(values)) if len(set(values)) > 1 else 0.0
            values = [(value - float(np.mean(values))) / spread if spread else 0.0 for value in values]
        elif asked.normalise == "rank":
            ranks = stats.rankdata(values)
            values = [(rank - 1) / (len(values) - 1) if len(values) > 1 else 0.5 for rank in ranks]
        assert isinstance(term.weight, float)
        totals = [
            total + term.weight * term.scale * value for total, value in zip(totals, values, strict=True)
        ]
    return totals


ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, VALUE)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(ROWS, st.sampled_from(["none", "zscore", "rank"]), st.data())
def test_whole_tables_are_weighed_as_each_query_alone(
    rows: list[dict[str, float]], how: str, data: st.DataObject
) -> None:
    asked = formula(normalise=how)
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    together = weigh(rows, asked, groups).totals
    for group in set(groups):
        mine = [number for number, of in enumerate(groups) if of == group]
        alone = [rows[number] for number in mine]
        np.testing.assert_allclose(together[mine], plain(alone, asked), atol=1e-9, rtol=1e-9)
        np.testing.assert_allclose(together[mine], weigh(alone, asked).totals, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(ROWS, st.sampled_from(["none", "zscore", "rank"]), st.randoms())
def test_neither_the_order_nor_a_row_that_is_out_changes_a_total(
    rows: list[dict[str, float]], how: str, random: Any
) -> None:
    asked = formula(normalise=how, gates={"reward": {"below": 1000.0}})
    totals = weigh(rows, asked).totals
    order = random.sample(range(len(rows)), len(rows))
    broken = [{"reward": 2000.0, "vlm.motion": 0.0, "vlm.look": 0.0}, {"reward": 1.0}]
    shuffled = weigh([*broken, *(rows[number] for number in order)], asked)
    np.testing.assert_allclose(shuffled.totals[2:], totals[order], atol=1e-9)
    assert np.isnan(shuffled.totals[:2]).all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(VALUE, st.integers(0, 4)), max_size=30))
def test_ranks_within_groups_are_scipys(pairs: list[tuple[float, int]]) -> None:
    values, groups = [value for value, _ in pairs], [group for _, group in pairs]
    found = group_ranks(values, groups)
    for group in set(groups):
        mine = [number for number, of in enumerate(groups) if of == group]
        assert found[mine].tolist() == (stats.rankdata([values[n] for n in mine]) - 1).tolist()


# Rows with the formula's columns


def test_the_formula_decides_in_place_of_the_score() -> None:
    rows, reasons = rows_by_formula(
        [row(), row(more_rewards=None), row(score=None), row(error="boom")],
        formula(terms={"reward": 1, "vlm.look": {"weight": 2, "above": 5}}),
    )
    assert [found["score"] for found in rows] == [8.0, None, None, 2.0]
    assert rows[0]["dimensions"] == [{"name": "reward", "score": 2.0}, {"name": "vlm.look", "score": 6.0}]
    assert rows[0]["refused"] == "vlm.look not above 5"
    assert Counter(reasons) == {"formula: no reward gave vlm.look": 1}
