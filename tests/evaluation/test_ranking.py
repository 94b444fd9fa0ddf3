"""Bradley–Terry gives the order that the comparisons make most likely, and how sure it is."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from vpo_ray.evaluation.ranking import bradley_terry, rank_policies

COUNTS = st.integers(2, 6).flatmap(lambda k: arrays(float, (k, k), elements=st.integers(0, 200)))


@given(COUNTS)
@settings(max_examples=40, deadline=None)
def test_strengths_maximise_the_likelihood(wins: np.ndarray) -> None:
    np.fill_diagonal(wins, 0)
    won = (wins + 0.25) * (1 - np.eye(len(wins)))

    def loss(strengths: np.ndarray) -> float:
        return float((won * np.logaddexp(0, strengths[None, :] - strengths[:, None])).sum())

    best = minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-7})
    found = bradley_terry(wins)
    assert loss(found) <= best.fun + 1e-9 * abs(best.fun)
    np.testing.assert_allclose(found, best.x - best.x.mean(), atol=2e-3)


@given(COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_policies_does_not_matter(wins: np.ndarray, random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(wins)))
    random.shuffle(order)
    moved = bradley_terry(wins[np.ix_(order, order)])
    np.testing.assert_allclose(moved, bradley_terry(wins)[order], atol=1e-7)


def test_two_policies_differ_by_the_log_of_their_odds_and_ties_are_half_wins() -> None:
    strengths = bradley_terry([[0, 300], [100, 0]], prior=0)
    assert strengths[0] - strengths[1] == pytest.approx(log(3))
    tied = bradley_terry([[0, 250], [50, 0]], [[0, 100], [100, 0]], prior=0)
    np.testing.assert_allclose(tied, strengths)


def test_policies_that_win_everything_or_meet_nobody_have_finite_strengths() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1:3], wins[1, 2] = 1_000_000, 1000
    strengths = bradley_terry(wins)
    assert np.isfinite(strengths).all()
    assert strengths[0] > strengths[1] > strengths[2]
    assert bradley_terry(np.zeros((3, 3))) == pytest.approx(0.0)


def planted(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n queries on which three policies meet: the odds of the first are 4 : 1, the others are equal."""
    rng = np.random.default_rng(2)
    wins, ties = np.zeros((n, 3, 3)), np.zeros((n, 3, 3))
    for query in range(n):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            first = rng.random() < (0.8 if i == 0 else 0.5)
            wins[query, *((i, j) if first else (j, i))] = 1
    return wins, ties


def test_a_planted_order_is_found_with_intervals_over_queries() -> None:
    best, *others = rank_policies(*planted(300), resamples=2000)
    assert best.low > max(other.high for other in others)
    assert best.value - others[0].value == pytest.approx(log(4), abs=0.4)
    assert all(other.low < others[0].value < other.high for other in others)
    assert [best.n, best.note] == [300, None]
    wider = rank_policies(*planted(40), resamples=2000)[0]
    assert wider.high - wider.low > 2 * (best.high - best.low)


def test_a_ranking_of_too_little_says_so() -> None:
    assert {each.note for each in rank_policies(*planted(0))} == {"no queries"}
    assert {each.note for each in rank_policies(*planted(1))} == {"one query only"}
    wins, ties = planted(5)
    wins[:, 2], wins[:, :, 2] = 0, 0
    first, second, third = rank_policies(wins, ties, resamples=1000)
    assert first.low is not None
    assert second.low is not None
    assert (third.value, third.n, third.note) == (None, 0, "no queries")
    with pytest.raises(ValueError, match=r"\[queries, k, k\]"):
        rank_policies(np.zeros((3, 3)), np.zeros((3, 3)))
