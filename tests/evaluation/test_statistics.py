"""Statistics of an evaluation hold what they promise, and agree with SciPy and with published examples."""

from math import comb, isclose, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from vpo_ray.evaluation import statistics
from vpo_ray.evaluation.statistics import (
    Resamples,
    agreement,
    both_orders,
    difference,
    flip_rate,
    holm,
    mcnemar,
    mean_interval,
    per_query,
    share_interval,
    sign_test,
    smallest_detectable,
    variance_parts,
)

FEW = 1000  # resamples, where their number does not matter
NUMBERS = st.floats(-1e6, 1e6) | st.just(nan)


def tables(columns: int = 3) -> st.SearchStrategy[np.ndarray]:
    """Values of up to 12 queries and some seeds, some absent."""
    shapes = st.tuples(st.integers(1, 12), st.integers(1, columns))
    return shapes.flatmap(lambda shape: arrays(float, shape, elements=NUMBERS))


# --- Means and their intervals


@given(tables(), st.floats(0.5, 0.99))
@settings(max_examples=50)
def test_an_interval_is_within_the_values_and_wider_with_more_confidence(
    values: np.ndarray, confidence: float
) -> None:
    each = per_query(values)
    each = each[~np.isnan(each)]
    found, wider = (mean_interval(values, c, FEW) for c in (confidence, (1 + confidence) / 2))
    assert found.n == len(each)
    if found.stderr is None:
        assert found.note
        assert (found.low, found.high) == (None, None)
        return
    slack = 1e-8 * np.ptp(each)
    assert each.min() - slack <= wider.low <= found.low <= found.high <= wider.high <= each.max() + slack
    assert isclose(found.value, each.mean(), abs_tol=1e-9 * np.abs(each).max())


@given(tables())
@settings(max_examples=50)
def test_a_seed_given_twice_adds_no_certainty(values: np.ndarray) -> None:
    once, twice = mean_interval(values, 0.95, FEW), mean_interval(np.hstack([values, values]), 0.95, FEW)
    assert (once.n, once.note) == (twice.n, twice.note)
    assert once.low == pytest.approx(twice.low)
    assert once.high == pytest.approx(twice.high)


def test_the_interval_is_scipys_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=40)
    found = mean_interval(values, 0.9, 10_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=10_000, method="percentile", rng=5
    )
    # A 5 % quantile of 10,000 draws has an error of 0.021 standard deviations: five of the difference.
    slack = 5 * sqrt(2) * 0.021 * found.stderr
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=slack)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=slack)
    assert found.stderr == pytest.approx(stats.sem(values))


def test_95_percent_intervals_hold_the_mean_about_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (400, 100))
    found = [mean_interval(values, 0.95, FEW) for values in draws]
    assert 0.92 <= np.mean([i.low <= 3.0 <= i.high for i in found]) <= 0.98


@pytest.mark.parametrize(
    ("values", "value", "n", "note"),
    [
        ([], None, 0, "no queries"),
        ([nan, nan], None, 0, "no queries"),
        ([nan, 2.5], 2.5, 1, "one query only"),
        ([[0.1, 0.2, 0.3]], 0.2, 1, "one query only"),
        ([0.7] * 40, 0.7, 40, "constant"),
        ([[0.1, nan], [0.1, 0.1]], 0.1, 2, "constant"),
    ],
)
def test_a_mean_of_too_little_says_so(values: list, value: float | None, n: int, note: str) -> None:
    found = mean_interval(values)
    assert (found.n, found.note) == (n, note)
    assert found.value == (None if value is None else pytest.approx(value))
    assert (found.stderr, found.low, found.high) == (None, None, None)


@pytest.mark.parametrize("function", [mean_interval, variance_parts, lambda v: difference(v, v)])
def test_infinite_values_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"an infinite value at \[1, 0\]"):
        function([[1.0], [np.inf]])


# --- Resamples


@given(tables(columns=5))
@settings(max_examples=30)
def test_resampled_means_are_those_of_the_queries_drawn(values: np.ndarray) -> None:
    draws = Resamples(len(values), 50, seed=2)
    weights = np.vstack(list(draws._drawn())).astype(float)
    assert (weights.sum(axis=1) == len(values)).all()
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        expected = weights @ np.nan_to_num(values) / (weights @ present)
    largest = np.nanmax(np.abs(values), initial=0.0)
    np.testing.assert_allclose(draws.means(values), expected, atol=1e-8 * largest)


def test_resampled_means_are_the_same_to_the_bit_however_they_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(4.0, 1.0, (300, 7))
    values[::9, 3] = nan
    once = Resamples(300, 2000, seed=4).means(values)
    assert all((Resamples(300, 2000, 4).means(values[:, [c]]) == once[:, [c]]).all() for c in range(7))
    monkeypatch.setattr(statistics, "_KEPT", 0)
    drawn_again = Resamples(300, 2000, seed=4)
    assert (drawn_again.means(values) == once).all()
    assert (drawn_again.means(values) == once).all()
    assert (Resamples(300, 2000, seed=5).means(values) != once).any()


def test_resamples_of_another_number_of_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resamples of 3 queries, values of shape \(4, 1\)"):
        Resamples(3, 10).means(np.zeros((4, 1)))
    with pytest.raises(ValueError, match="at least 1"):
        Resamples(0)


# --- Differences


@given(tables().flatmap(lambda a: st.tuples(st.just(a), arrays(float, a.shape, elements=NUMBERS))))
@settings(max_examples=50)
def test_a_difference_turned_round_is_the_same(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    there, back = difference(a, b, 0.95, FEW), difference(b, a, 0.95, FEW)
    assert (there.win, there.tie, there.loss) == (back.loss, back.tie, back.win)
    assert there.win + there.tie + there.loss == there.n
    assert there.p == back.p
    assert there.smallest_detectable == back.smallest_detectable
    if there.stderr is not None:
        assert there.low == pytest.approx(-back.high, rel=1e-6, abs=1e-6 * there.stderr)
    worse = difference(a, b, 0.95, FEW, higher_is_better=False)
    assert (worse.value, worse.win, worse.loss) == (there.value, there.loss, there.win)


@pytest.mark.parametrize(
    ("a", "b", "note", "p"),
    [
        ([], [], "no queries", None),
        ([1.0, nan], [2.0, 3.0], "one query only", None),
        ([0.1] * 40, [0.1] * 40, "all 40 queries tie", None),
        ([0.1, 0.7], [0.4, 1.0], "constant: every query differs by 0.3", 0.5),
        ([[0.3, 0.7], [0.0, 0.0]], [[0.2, 0.8], [0.0, 0.0]], "all 2 queries tie", None),  # but for rounding
    ],
)
def test_a_difference_of_too_little_says_so(a: list, b: list, note: str, p: float | None) -> None:
    found = difference(a, b)
    assert (found.note, found.p) == (note, p)
    assert (found.stderr, found.low, found.high, found.smallest_detectable) == (None, None, None, None)


def test_a_win_is_a_difference_of_at_least_what_is_similar() -> None:
    a, b = [0.2, 0.2, 0.2, 0.2], [0.3, 0.25, 0.1, nan]  # 0.3 - 0.2 is a little less than 0.1
    found = difference(a, b, similar=0.1)
    assert (found.win, found.tie, found.loss, found.n) == (1, 1, 1, 3)
    tied = difference(a, b, similar=0.5)
    assert (tied.tie, tied.p, tied.note) == (3, None, "all 3 queries tie")
    assert tied.low is not None  # the mean difference has its interval all the same


def test_policies_are_paired_by_seed_too() -> None:
    # b is better by 1 at each seed; it lacks the seed at which a is best.
    found = difference([[0.0, 10.0], [1.0, 2.0], [3.0, 4.0]], [[1.0, nan], [2.0, 3.0], [4.0, 6.0]])
    assert (found.value, found.win) == (pytest.approx(3.5 / 3), 3)
    with pytest.raises(ValueError, match="one shape"):
        difference([1.0, 2.0], [1.0])


def test_the_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    n, deviation = 100, 2.0
    effect = smallest_detectable(deviation, n)
    draws = np.random.default_rng(1).normal(effect, deviation, (4000, n))
    assert np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)
    assert smallest_detectable(deviation, n, confidence=0.99) > effect


def test_the_smallest_detectable_difference_of_shares_follows_from_the_queries_that_differ() -> None:
    a, b = np.zeros(500), np.zeros(500)
    a[:20], b[20:60] = 1.0, 1.0
    found = difference(a, b)
    assert found.smallest_detectable == smallest_detectable(sqrt(60 / 500), 500)
    assert found.p == mcnemar(20, 40)


# --- Tests and shares


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_and_mcnemars_are_the_exact_binomial_test(win: int, loss: int) -> None:
    n = win + loss
    if not n:
        assert sign_test(0, 0) is None
        return
    tail = sum(comb(n, k) for k in range(max(win, loss), n + 1)) / 2**n
    assert sign_test(win, loss) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(win, loss) == mcnemar(loss, win) == sign_test(win, loss)


@pytest.mark.parametrize(("won", "of"), [(61, 100), (115, 200), (273, 500), (532, 1000)])
def test_wins_that_are_just_enough(won: int, of: int) -> None:
    assert sign_test(won, of - won) < 0.05 <= sign_test(won - 1, of - won + 1)


# Wilson's intervals as Newcombe prints them (Statistics in Medicine 17, 1998, table I, method 3).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_interval(successes: int, n: int, low: float, high: float) -> None:
    found = share_interval(successes, n)
    assert (found.value, found.n) == (successes / n, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (found.stderr is None) == (successes == 0)


def test_a_share_of_nothing_says_so() -> None:
    assert (share_interval(0, 0).value, share_interval(0, 0).note) == (None, "no queries")


@given(st.lists(st.none() | st.just(nan) | st.floats(0, 1), max_size=8), st.floats(0.001, 0.999))
def test_holms_p_values_reject_what_his_procedure_does(ps: list[float | None], level: float) -> None:
    rejected: set[int] = set()
    left = [at for at, p in enumerate(ps) if p is not None and p == p]
    while left:  # the smallest p of m that are left is held against level / m, until one fails
        least = min(left, key=lambda at: ps[at])  # type: ignore[arg-type,return-value]
        if ps[least] * len(left) > level:
            break
        rejected.add(least)
        left.remove(least)
    adjusted = holm(ps)
    assert {at for at, p in enumerate(adjusted) if p is not None and p <= level} == rejected
    assert all(p is q or p != p for p, q in zip(adjusted, ps, strict=True) if q is None or q != q)


# --- Judges and raters


def test_a_win_is_one_in_both_orders() -> None:
    places = ("a", "b", "tie", None)
    found = {(x, y): both_orders(x, y) for x in places for y in places}
    assert [pair for pair, winner in found.items() if winner == "a"] == [("a", "b")]
    assert [pair for pair, winner in found.items() if winner == "b"] == [("b", "a")]
    assert {pair for pair, winner in found.items() if winner is None} == {p for p in found if None in p}
    # Of nine pairs that were answered, three say the same in both orders.
    assert flip_rate(found) == pytest.approx(6 / 9)
    assert flip_rate([("a", None)]) is None


def test_a_position_bias_of_20_points_changes_no_winner() -> None:
    rng = np.random.default_rng(8)
    for advantage in (-8.0, -3.0, 3.0, 8.0):  # of policy b over a, of 100 points; queries differ by 30
        ahead = rng.normal(advantage, 30.0, 400)
        # A judge that gives what it sees first 20 points more.
        first = ["b" if d > 20 else "a" for d in ahead]
        second = ["a" if d > -20 else "b" for d in ahead]
        winners = [both_orders(*pair) for pair in zip(first, second, strict=True)]
        right = ["b" if d > 0 else "a" for d in ahead]
        assert first != right != ["b" if place == "a" else "a" for place in second]  # one order alone errs
        assert all(winner in ("tie", truth) for winner, truth in zip(winners, right, strict=True))
        assert (winners.count("b") > winners.count("a")) == (right.count("b") > right.count("a"))
        ties = winners.count("tie") / len(winners)
        assert flip_rate(zip(first, second, strict=True)) == ties == pytest.approx(np.mean(abs(ahead) <= 20))


def test_a_position_bias_of_20_points_makes_no_winner_of_equals() -> None:
    """A judge that picks by chance, what it sees first with 70 % instead of 50 %."""
    rng, found = np.random.default_rng(9), 0
    for _ in range(2000):
        places = np.where(rng.random((200, 2)) < 0.7, "a", "b").tolist()
        winners = [both_orders(*pair) for pair in places]
        found += (sign_test(winners.count("a"), winners.count("b")) or 1.0) < 0.05
    assert found <= 100


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), examples A and C: raters by row.
TWO_RATERS = ["0100000010", "1110010000"]
FOUR_RATERS = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


@pytest.mark.parametrize(("raters", "alpha"), [(TWO_RATERS, 0.095), (FOUR_RATERS, 0.743)])
def test_agreement_is_krippendorffs(raters: list[str], alpha: float) -> None:
    votes = [[None if vote == "." else vote for vote in item] for item in zip(*raters, strict=True)]
    assert agreement(votes).alpha == pytest.approx(alpha, abs=5e-4)


def test_agreement_counts_pairs_of_votes_on_one_item() -> None:
    found = agreement([["a", "a", "b"], ["b", "b"], ["a", None], []])
    assert (found.share, found.n) == (2 / 4, 2)
    assert agreement([["a", "a"], ["b", "b"]]).alpha == 1.0
    unanimous = agreement([["a", "a"], ["a", "a"]])
    assert (unanimous.alpha, unanimous.share) == (None, 1.0)  # one answer alone: chance agrees as well
    assert (agreement([["a"]]).alpha, agreement([["a"]]).share) == (None, None)


# --- Variance of queries and seeds


@given(st.integers(0, 10_000), st.booleans())
def test_variance_parts_are_those_of_scipys_analysis_of_variance(seed: int, complete: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 2.0, (12, 1)) + rng.normal(0, 1.0, (12, 4))
    if not complete:
        values[rng.random(values.shape) < 0.3] = nan
        values[:, 0] = 1.0 + np.arange(12)
    groups = [row[~np.isnan(row)] for row in values]
    sizes = np.array([len(group) for group in groups])
    found = variance_parts(values)
    typical = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / 11
    ratio = stats.f_oneway(*groups).statistic
    assert found.seeds == pytest.approx(sum(g.var() * len(g) for g in groups) / (sizes.sum() - 12))
    assert found.queries == pytest.approx(max(0.0, (ratio - 1) * found.seeds / typical), abs=1e-9)


def test_variance_parts_take_several_seeds_and_queries() -> None:
    assert variance_parts([[1.0], [2.0]]) == variance_parts([]) == variance_parts([[nan, 1.0], [2.0, nan]])
    assert variance_parts([[1.0], [2.0]]).seeds is None
    assert variance_parts([[1.0, 3.0]]) == statistics.VarianceParts(None, 2.0)
    rng = np.random.default_rng(5)
    found = variance_parts(rng.normal(0, 3.0, (2000, 1)) + rng.normal(0, 1.0, (2000, 3)))
    assert (found.queries, found.seeds) == (pytest.approx(9.0, rel=0.1), pytest.approx(1.0, rel=0.1))


# --- What an evaluation finds

# VPO, table 2, for CogVideoX-5B, and its optimiser for 2B: % of 500 queries, by verdict.
VERDICTS = ("aligned", "unsafe", "imprecise", "refusal")
TABLE_2 = {
    "GLM-4 few-shot": (83.4, 5.4, 10.0, 1.2),
    "GPT-4o few-shot": (86.4, 2.4, 8.6, 2.6),
    "VPO-SFT": (93.8, 0.8, 5.4, 0.0),
    "VPO w/o TL": (92.8, 1.2, 6.0, 0.0),
    "VPO for 2B": (94.6, 0.6, 4.8, 0.0),
    "VPO": (94.8, 0.4, 4.8, 0.0),
}


def test_table_2_of_the_paper_and_what_its_500_queries_cannot_show() -> None:
    samples = {
        policy: np.repeat(VERDICTS, [round(share * 5) for share in shares])
        for policy, shares in TABLE_2.items()
    }
    for policy, verdicts in samples.items():
        found = [share_interval(int((verdicts == v).sum()), 500).value * 100 for v in VERDICTS]
        assert found == pytest.approx(TABLE_2[policy])
    # Which queries of two policies have which verdict is not published. At best one policy's misaligned ones
    # are among the other's; by chance they are anywhere.
    rng = np.random.default_rng(1)
    aligned = {policy: (verdicts == "aligned").astype(float) for policy, verdicts in samples.items()}
    vpo = aligned.pop("VPO")
    at_best = {policy: difference(values, vpo) for policy, values in aligned.items()}
    by_chance = {policy: difference(rng.permutation(v), vpo) for policy, v in aligned.items()}
    for policy, found in (*at_best.items(), *by_chance.items()):
        assert found.value * 100 == pytest.approx(94.8 - TABLE_2[policy][0])
    never = {policy for policy, found in at_best.items() if found.p >= 0.05}
    assert never == {"VPO-SFT", "VPO for 2B"}
    assert sign_test(10 + 5, 5) < 0.05 < sign_test(10 + 6, 6)  # w/o TL: if 21 queries are in both
    shown = {policy for policy, found in by_chance.items() if found.p < 0.05}
    assert shown == {"GLM-4 few-shot", "GPT-4o few-shot"}
    assert shown == {p for p, found in by_chance.items() if found.value > found.smallest_detectable}
    # 0.2 points: one query, which cannot be told from none whichever it is; 500 queries show 0.6 at best.
    least = at_best["VPO for 2B"]
    assert (least.win, least.loss, least.p) == (1, 0, 1.0)
    assert least.value < 0.005 < least.smallest_detectable < by_chance["VPO for 2B"].smallest_detectable


def evaluations(seed: int, better: float, worse: float) -> list[statistics.Difference]:
    """500 evaluations of 200 queries, on these shares of which b is better, or worse, by 0 to 1 point."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([1.0, -1.0, 0.0], (500, 200), p=[better, worse, 1 - better - worse])
    a = rng.normal(4.0, 1.0, signs.shape)
    b = a + signs * rng.random(signs.shape)
    return [difference(first, second, 0.95, FEW) for first, second in zip(a, b, strict=True)]


def test_a_policy_that_is_better_on_60_percent_and_worse_on_25_is_found() -> None:
    found = evaluations(11, 0.6, 0.25)
    assert sum(each.p < 0.05 and each.win > each.loss for each in found) >= 475
    assert sum(each.low > 0 for each in found) >= 475


def test_without_a_difference_one_is_found_in_5_percent_at_most() -> None:
    found = evaluations(12, 0.4, 0.4)
    assert sum(each.p < 0.05 for each in found) <= 25


@pytest.mark.parametrize(("n", "power"), [(200, 0.79), (327, 0.95)])
def test_the_power_of_the_sign_test_at_60_to_40_without_ties(n: int, power: float) -> None:
    """What docs/evaluation.md says: 200 such queries do not show it 95 times in 100."""
    shown = [wins for wins in range(n + 1) if sign_test(wins, n - wins) < 0.05]
    assert stats.binom.pmf(shown, n, 0.6).sum() == pytest.approx(power, abs=0.01)
