"""Previews: who is rendered in full, and how far previews agree with full renders."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.recipe import Formula, Pair, Preview
from vpo_ray.records import FEEDBACK, Row
from vpo_ray.stages.adaptive import ALONE, TEXT_FIRST, TWIN
from vpo_ray.stages.gate import BELOW
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.preview import (
    ALIKE,
    BETWEEN,
    UNSCORED,
    decide_by_previews,
    extremes,
    order_agreement,
    probe_figures,
    prompts_to_preview,
)

ANY = Pair(margin=0.5, dominance="none")
LOOK = Preview(steps=2)


def candidate(k: int, prompt: str = "", **more: Any) -> Row:
    base = dict.fromkeys(FEEDBACK.names)
    key = {"candidate_id": f"c{k}", "query_id": "q", "query": "a cat", "k": k, "seed": 1}
    return {**base, **key, "prompt": prompt or f"prompt {k}", "verdict": "aligned", **more}


def scored(row: Row, score: float | None, **more: Any) -> Row:
    """A row as the score stage leaves it; without a score it failed."""
    if score is None:
        return {**row, "error": "black frames", "error_stage": "render", **more}
    return {**row, "video_key": f"v{row['k']}", "score": score, "answers": [], "dimensions": [], **more}


def previews(*scores: float | None) -> dict[str, Row]:
    return {f"c{k}": scored(candidate(k), score) for k, score in enumerate(scores)}


def rendered(decisions: dict[str, str | None]) -> set[str]:
    return {name for name, reason in decisions.items() if reason is None}


def test_the_best_and_the_worst_are_rendered_in_full() -> None:
    rows = [candidate(k) for k in (3, 1, 0, 2)]
    found = decide_by_previews(rows, previews(0.2, 0.9, 0.5, 0.1), LOOK, ANY)
    assert found == {"c0": BETWEEN, "c1": None, "c2": BETWEEN, "c3": None}
    three = LOOK.model_copy(update={"keep": 3})
    assert rendered(decide_by_previews(rows, previews(0.2, 0.9, 0.5, 0.1), three, ANY)) == {"c1", "c2", "c3"}
    many = LOOK.model_copy(update={"keep": 9})
    assert rendered(decide_by_previews(rows, previews(0.2, 0.9, 0.5, 0.1), many, ANY)) == {
        *previews(0, 0, 0, 0)
    }


def test_equal_previews_are_ordered_by_their_candidates() -> None:
    rows = [candidate(k) for k in range(4)]
    assert rendered(decide_by_previews(rows, previews(1.0, 1.0, 1.0, 1.0), LOOK, ANY)) == {"c0", "c3"}
    margin = LOOK.model_copy(update={"margin": 0.0})
    assert set(decide_by_previews(rows, previews(1.0, 1.0, 1.0, 1.0), margin, ANY).values()) == {ALIKE}
    assert rendered(decide_by_previews(rows, previews(1.0, 1.0, 1.1, 1.0), margin, ANY)) == {"c2", "c3"}
    wide = LOOK.model_copy(update={"margin": 0.25})
    assert set(decide_by_previews(rows, previews(1.0, 1.25, 1.25, 1.0), wide, ANY).values()) == {ALIKE}


def test_a_query_of_the_probe_is_rendered_whole() -> None:
    rows = [candidate(0), candidate(1, "same"), candidate(2, "same"), candidate(3)]
    assert decide_by_previews(rows, None, LOOK, ANY) == {"c0": None, "c1": None, "c2": TWIN, "c3": None}


def test_a_query_waits_for_all_its_previews() -> None:
    rows = [candidate(k) for k in range(3)]
    assert decide_by_previews(rows, previews(1.0, 2.0), LOOK, ANY) == {}
    assert decide_by_previews(rows, {}, LOOK, ANY) == {}


def test_previews_that_failed_choose_nothing() -> None:
    rows = [candidate(k) for k in range(3)]
    found = decide_by_previews(rows, previews(1.0, None, 2.0), LOOK, ANY)
    assert found == {"c0": None, "c1": UNSCORED, "c2": None}
    assert decide_by_previews(rows, previews(1.0, None, None), LOOK, ANY) == {
        "c0": ALONE, "c1": UNSCORED, "c2": UNSCORED,
    }  # fmt: skip
    assert set(decide_by_previews(rows, previews(None, None, None), LOOK, ANY).values()) == {UNSCORED}


def test_texts_alone_may_tell_that_no_preview_is_needed() -> None:
    one = [candidate(0), candidate(1, verdict="unsafe")]
    assert prompts_to_preview(one, ANY, None) == []
    assert decide_by_previews(one, {}, LOOK, ANY) == {"c0": ALONE, "c1": None}
    refined = candidate(2, verdict="unsafe", refined_prompt="a kind cat", refined_verdict="aligned")
    text = [candidate(0), candidate(1), refined]
    assert decide_by_previews(text, {}, LOOK, ANY) == {"c0": TEXT_FIRST, "c1": TEXT_FIRST, "c2": None}
    assert prompts_to_preview(text, ANY.model_copy(update={"precedence": "both"}), None) != []
    failed = candidate(1, error="no verdict", error_stage="judge")
    assert decide_by_previews([candidate(0), failed], {}, LOOK, ANY) == {"c0": ALONE, "c1": None}


def test_what_the_gate_stopped_takes_no_place() -> None:
    rows = [candidate(k) for k in range(4)]
    seen = previews(0.2, 0.9, 0.5, 0.1) | {"c1": candidate(1, skipped=f"{BELOW}score under 1")}
    found = decide_by_previews(rows, seen, LOOK, ANY)
    assert found == {"c0": BETWEEN, "c1": None, "c2": None, "c3": None}, "the render stage says why"
    rows[1]["skipped"] = seen["c1"]["skipped"]
    assert decide_by_previews(rows, seen, LOOK, ANY) == {"c0": BETWEEN, "c2": None, "c3": None}
    alone = seen | {"c2": candidate(2, skipped=f"{BELOW}score under 1")}
    alone |= {"c3": scored(candidate(3), None)}
    assert decide_by_previews(rows, alone, LOOK, ANY) == {"c0": ALONE, "c2": None, "c3": UNSCORED}


def test_what_decides_on_pairs_decides_on_previews() -> None:
    rows = [candidate(k) for k in range(3)]

    def seen(k: int, score: float, motion: float) -> Row:
        more = [{"name": "motion", "reward": "x", "answers": [], "dimensions": [], "score": motion}]
        return scored(candidate(k), score, more_rewards=more)

    looks = {row["candidate_id"]: row for row in (seen(0, 3, 1), seen(1, 2, 9), seen(2, 1, 5))}
    assert rendered(decide_by_previews(rows, looks, LOOK, ANY)) == {"c0", "c2"}
    by_motion = ANY.model_copy(update={"reward": "motion"})
    assert rendered(decide_by_previews(rows, looks, LOOK, by_motion)) == {"c0", "c1"}
    formula = Formula.model_validate({"terms": {"reward": 10, "motion": 1}})
    by_formula = ANY.model_copy(update={"by": "formula"})
    assert rendered(decide_by_previews(rows, looks, LOOK, by_formula, formula)) == {"c0", "c2"}
    gated = Formula.model_validate({"terms": {"motion": 1}, "gates": {"reward": {"above": 1.5}}})
    assert decide_by_previews(rows, looks, LOOK, by_formula, gated)["c2"] == UNSCORED


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 3).map(float)), min_size=1, max_size=7),
    st.integers(2, 4),
    st.sampled_from([None, 0.0, 1.0]),
    st.integers(),
)
def test_who_is_chosen(scores: list[float | None], keep: int, margin: float | None, seed: int) -> None:
    settings = Preview(steps=1, keep=keep, margin=margin)
    rows, looks = [candidate(k) for k in range(len(scores))], previews(*scores)
    found = decide_by_previews(rows, looks, settings, ANY)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert decide_by_previews(shuffled, looks, settings, ANY) == found, "the order of rows is no matter"
    assert found.keys() == looks.keys(), "every candidate has its decision"
    known = [score for score in scores if score is not None]
    chosen = [score for k, score in enumerate(scores) if found[f"c{k}"] is None]
    spread = max(known) - min(known) if known else 0.0
    if len(known) < 2 or (margin is not None and spread <= margin):
        assert chosen == []
    else:
        assert len(chosen) == min(keep, len(known))
        assert {max(known), min(known)} <= set(chosen)
    assert all(score is not None for score in chosen)


@given(st.integers(0, 9), st.integers(2, 10))
def test_extremes_are_taken_from_both_ends(count: int, keep: int) -> None:
    ranked = [{"k": k} for k in range(count)]
    chosen = [row["k"] for row in extremes(ranked, keep)]
    assert len(set(chosen)) == len(chosen) == min(keep, count)
    top = sum(k < count / 2 for k in chosen)
    assert count < 2 or abs(top - (len(chosen) - top)) <= 1
    assert set(chosen) == {*range(top), *range(count - (len(chosen) - top), count)}


def test_agreement_by_hand() -> None:
    one = [(0.1, 1.0), (0.2, 2.0), (0.2, 3.0), (0.9, 3.0)]
    # 5 of its 6 pairs differ in full; one of these is a tie of previews, none is the wrong way round.
    assert order_agreement([one])["agreement"] == pytest.approx(4.5 / 5)
    found = order_agreement([one, [(2.0, 1.0), (1.0, 2.0)], [(1.0, 1.0)], []])
    assert (found["pairs"], found["ties"], found["queries"]) == (6, 1, 2)
    assert found["agreement"] == pytest.approx(4.5 / 6)
    assert order_agreement([[(1.0, 1.0), (2.0, 1.0)]])["agreement"] is None
    assert order_agreement([]) == {
        "agreement": None, "low": None, "high": None, "pairs": 0, "ties": 0, "queries": 0,
    }  # fmt: skip


def test_an_interval_counts_queries_where_pairs_say_the_same() -> None:
    alike = [[(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]] * 8
    found = order_agreement(alike)
    # Wilson's interval of 8 of 8 (48 of 48 would be from 0.926).
    assert (found["agreement"], found["high"]) == (1.0, 1.0)
    assert found["low"] == pytest.approx(0.6756, abs=1e-3)
    split = order_agreement([*alike[:4], *[[(-p, f) for p, f in query] for query in alike[:4]]])
    assert (split["agreement"], split["low"]) == (0.5, pytest.approx(0.2152, abs=1e-3)), "4 of 8"
    independent = order_agreement([[(0.0, 0.0), (1.0, 1.0)]] * 9 + [[(1.0, 0.0), (0.0, 1.0)]])
    assert independent["low"] == pytest.approx(0.5958, abs=1e-3), "9 of 10"


SCORES = st.lists(st.tuples(st.integers(0, 3).map(float), st.integers(0, 3).map(float)), max_size=5)


@given(st.lists(SCORES, max_size=6))
def test_agreement_is_a_share_that_monotone_changes_of_scores_leave_alone(queries: list[Any]) -> None:
    found = order_agreement(queries)
    pairs = [pair for query in queries for pair in itertools.combinations(query, 2)]
    assert found["pairs"] == sum(a[1] != b[1] for a, b in pairs)
    assert order_agreement([[(p * 5 - 1, f**3) for p, f in query] for query in queries]) == found
    assert order_agreement([query[::-1] for query in queries[::-1]]) == found
    if found["agreement"] is None:
        assert found["pairs"] == 0
        return
    assert 0 <= found["low"] <= found["agreement"] <= found["high"] <= 1
    turned = order_agreement([[(-p, f) for p, f in query] for query in queries])
    assert turned["agreement"] == pytest.approx(1 - found["agreement"], abs=1e-4)
    perfect = order_agreement([[(f, f) for _, f in query] for query in queries])
    assert (perfect["agreement"], perfect["ties"]) == (1.0, 0)


def test_the_probe_says_how_many_pairs_previews_would_have_found() -> None:
    def query(full: list[float | None], look: list[float | None]) -> tuple[dict[str, Row], list[Row]]:
        rows = [scored(candidate(k), score) for k, score in enumerate(full)]
        return previews(*look), [*rows, candidate(9, verdict="unsafe")]

    probe = [
        query([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        query([1.0, 1.0, 3.0], [1.0, 3.0, 2.0]),  # previews take two that are alike
        query([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),  # there is no pair
        query([1.0, None, 3.0], [None, 1.0, 2.0]),
    ]
    found = probe_figures(probe, LOOK, ANY)
    assert (found["paired"], found["paired_by_previews"]) == (3, 1)
    assert (found["pairs"], found["agreement"]) == (5, pytest.approx(4 / 5))
    assert pairs_of_query(probe[1][1], ANY, Counter()), "all full renders give one"


def test_a_twin_of_what_the_gate_stopped_is_no_prompt_of_its_own() -> None:
    below = f"{BELOW}score under 1"
    rows = [candidate(0, "same", skipped=below), candidate(1, "same"), candidate(2), candidate(3)]
    looks = previews(0.0, 0.0, 1.0, 2.0)
    del looks["c1"]
    looks["c0"] = candidate(0, "same", skipped=below)
    assert decide_by_previews(rows, looks, LOOK, ANY) == {"c1": TWIN, "c2": None, "c3": None}
