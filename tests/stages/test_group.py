"""Groups: every candidate of a query with a reward, those that the judge refuses at a floor."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.recipe import Rl
from vpo_ray.records import GROUP, Row, table
from vpo_ray.stages.group import advantages, group_of_query

NEEDED = {"epochs": 1, "lr": 1e-6, "global_batch": 8}


def candidate(k: int, score: float | None = None, verdict: str | None = "aligned", **more: Any) -> Row:
    return {
        "candidate_id": f"c{k}",
        "query_id": "q",
        "query": "a red ball",
        "k": k,
        "prompt": f"prompt {k}",
        "verdict": verdict,
        "answers": None,
        "dimensions": None,
        "score": score,
        "more_rewards": None,
        "error": None,
        "error_stage": None,
        **more,
    }


def grouped(*rows: Row, **options: Any) -> tuple[Row | None, Counter[str], Counter[str]]:
    left_out, without = Counter[str](), Counter[str]()
    found = group_of_query(rows, Rl(**NEEDED, **options), 0.5, left_out, without)
    if found is not None:
        assert table([found], GROUP).num_rows == 1
    return found, left_out, without


def test_refused_candidates_have_a_floor() -> None:
    rows = [
        candidate(2, None, "unsafe"),
        candidate(0, 3.0),
        candidate(1, 1.0),
        candidate(3, None, "imprecise"),
    ]
    found, left_out, _ = grouped(*rows, floors={"unsafe": -2.0}, scale="none")
    assert found is not None
    assert found["candidate_ids"] == ["c0", "c1", "c2", "c3"]
    assert found["rewards"] == [3.0, 1.0, -2.0, 0.5]
    assert found["advantages"] == pytest.approx([2.375, 0.375, -2.625, -0.125])
    assert not left_out


def test_what_has_no_reward_is_left_out_and_counted() -> None:
    rows = [
        candidate(0, 3.0),
        candidate(1, 1.0),
        candidate(2),
        candidate(3, error="no memory", error_stage="render"),
        candidate(4, 2.0, prompt=" "),
    ]
    found, left_out, without = grouped(*rows)
    assert found is not None
    assert found["candidate_ids"] == ["c0", "c1"]
    assert left_out == {"no score": 1, "failed in render": 1, "no prompt": 1}
    assert not without


def test_queries_that_teach_nothing_are_counted() -> None:
    assert grouped(candidate(0, 1.0))[2] == {"fewer than two candidates with a reward": 1}
    assert grouped(candidate(0, 1.0), candidate(1, 1.0))[2] == {"all rewards are equal": 1}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_advantages_are_centred_and_scaled(rewards: list[float]) -> None:
    assert sum(advantages(rewards, "none")) == pytest.approx(0, abs=1e-9)
    scaled = advantages(rewards, "group")
    expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4)
    assert scaled == pytest.approx(expected.tolist(), abs=1e-9)


@given(st.permutations([candidate(k, float(k * k)) for k in range(5)]))
def test_a_group_does_not_depend_on_the_order_of_rows(rows: list[Row]) -> None:
    found, *_ = grouped(*rows)
    assert found is not None
    assert found["group_id"] == grouped(*sorted(rows, key=lambda row: row["k"]))[0]["group_id"]  # type: ignore[index]


def test_a_score_that_is_no_number_is_no_reward() -> None:
    rows = [candidate(0, 1.0), candidate(1, float("nan")), candidate(2, 3.0)]
    found, left_out, _ = grouped(*rows)
    assert found is not None
    assert found["candidate_ids"] == ["c0", "c2"]
    assert left_out == {"no score": 1}
