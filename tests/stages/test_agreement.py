"""How far rewards agree is Spearman's correlation among a query's videos, and a conflict is said."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vpo_ray.recipe import load
from vpo_ray.stages.agreement import (
    AgreementCount,
    compared,
    disagreements,
    mean_agreement,
    spearman_by_query,
)

VALUE = st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan")])
MORE = "more_rewards={vlm: {kind: vbench, dimensions: [dynamic_degree]}}"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(VALUE, VALUE, st.integers(0, 3)), min_size=1, max_size=25))
def test_it_is_scipys_within_each_query(rows: list[tuple[float, float, int]]) -> None:
    a, b, queries = (np.array(column) for column in zip(*rows, strict=True))
    found = spearman_by_query(a, b, queries)
    for query in range(len(found)):
        mine = (queries == query) & ~np.isnan(a) & ~np.isnan(b)
        x, y = a[mine], b[mine]
        if len(set(x)) < 2 or len(set(y)) < 2:
            assert np.isnan(found[query])
        else:
            assert found[query] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_the_interval_is_students_over_queries() -> None:
    values = np.array([0.5, -0.5, 1.0, np.nan, 0.2])
    known = values[~np.isnan(values)]
    low, high = stats.t.interval(0.95, 3, known.mean(), stats.sem(known))
    expected = {"mean": round(known.mean(), 4), "low": round(low, 4), "high": round(min(1.0, high), 4)}
    assert mean_agreement(values) == {**expected, "queries": 4}
    assert mean_agreement(values[:1]) == {"mean": 0.5, "low": None, "high": None, "queries": 1}
    assert mean_agreement(values[3:4])["mean"] is None


def row(query: str, score: float, other: float) -> dict[str, object]:
    vlm = {"name": "vlm", "score": other, "dimensions": []}
    return {"query_id": query, "score": score, "dimensions": None, "more_rewards": [vlm], "error": None}


def test_rewards_that_want_opposite_things_are_named() -> None:
    random = np.random.default_rng(1)
    count, lower = AgreementCount({"reward": 1.0, "vlm": 1.0}), AgreementCount({"reward": 1.0, "vlm": -1.0})
    for query in range(30):
        for score in random.normal(size=4):
            made = row(str(query), score, -score + random.normal() / 2)
            count.add(made)
            lower.add(made)
    count.add({**row("0", 1.0, 1.0), "error": "boom"})
    count.add({**row("0", 1.0, 1.0), "score": None})
    [entry] = count.result()
    assert (entry["a"], entry["b"], entry["queries"]) == ("reward", "vlm", 30)
    assert entry["high"] < -0.3
    [sentence] = disagreements([entry])
    assert "reward and vlm disagree" in sentence
    assert "30 queries" in sentence
    [agreeing] = lower.result()
    assert agreeing["mean"] == -entry["mean"], "less of a term with a negative weight is better"
    assert list(disagreements([agreeing, {**entry, "high": None}, {**entry, "high": 0.01}])) == []
    assert AgreementCount({"reward": 1.0, "vlm": 1.0}).result() == []


def test_what_is_compared_follows_the_recipe() -> None:
    tiny = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
    assert compared(load(tiny)) == {}
    assert compared(load(tiny, [MORE])) == {"reward": 1.0, "vlm": 1.0}
    terms = "formula={terms: {vlm.dynamic_degree: -1, vlm: {weight: [1, 0]}}}"
    assert compared(load(tiny, [MORE, terms])) == {"vlm.dynamic_degree": -1.0, "reward": 1.0}
