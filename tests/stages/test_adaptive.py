"""Adaptive rendering: as many pairs as with all videos, no video too many, whatever happens when."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.recipe import Pair
from vpo_ray.records import FEEDBACK, Row
from vpo_ray.stages.adaptive import (
    ALONE,
    ENOUGH,
    NO_VIDEO_PAIRS,
    TEXT_FIRST,
    TWIN,
    decide,
    videos_by_strategy,
)
from vpo_ray.stages.pair import pairs_of_query

NO_VIDEOS = Pair(video_per_query=0)
ANY = Pair(margin=0.5, dominance="none")


def candidate(k: int, prompt: str = "", **more: Any) -> Row:
    base = dict.fromkeys(FEEDBACK.names)
    key = {"candidate_id": f"c{k}", "query_id": "q", "query": "a cat", "k": k, "seed": 1}
    return {**base, **key, "prompt": prompt or f"prompt {k}", "verdict": "aligned", **more}


def misaligned(k: int, refined: str | None = "aligned") -> Row:
    return candidate(k, verdict="unsafe", refined_prompt="a kind cat", refined_verdict=refined)


def scored(k: int, score: float, **more: Any) -> Row:
    return candidate(k, video_key=f"v{k}", score=score, answers=[], dimensions=[], **more)


def test_the_first_two_prompts_are_rendered_at_once() -> None:
    rows = [candidate(k) for k in (3, 1, 2, 0)]
    assert decide(rows, ANY) == {"c0": None, "c1": None}
    rows = [misaligned(0, "unsafe"), candidate(1), candidate(2, error="no verdict", error_stage="judge")]
    rows += [candidate(3), candidate(4)]
    assert decide(rows, ANY) == {"c0": None, "c1": None, "c2": None, "c3": None}, "some only pass through"


def test_further_prompts_wait_for_the_results_of_those_before() -> None:
    rest = [candidate(2), candidate(3)]
    rendered = candidate(1, video_key="v1")
    assert decide([scored(0, 1.0), rendered, *rest], ANY) == {}
    assert decide([scored(0, 1.0), scored(1, 1.0), *rest], ANY) == {"c2": None}
    assert decide([scored(0, 1.0), scored(1, 2.0), *rest], ANY) == {"c2": ENOUGH, "c3": ENOUGH}
    failed = candidate(1, error="black frames", error_stage="render")
    assert decide([scored(0, 1.0), failed, *rest], ANY) == {"c2": None}
    two = Pair(margin=0.5, dominance="none", video_per_query=2)
    assert decide([scored(0, 1.0), scored(1, 2.0), *rest], two) == {"c2": None}


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([candidate(0), misaligned(1, "unsafe")], {}, ALONE),
        ([candidate(0, error="x", error_stage="judge"), candidate(1)], {}, ALONE),
        ([candidate(0), candidate(1), misaligned(2)], {}, TEXT_FIRST),
        ([candidate(0), candidate(1)], {"video_per_query": 0}, NO_VIDEO_PAIRS),
    ],
)
def test_texts_alone_may_tell_that_no_video_is_needed(
    rows: list[Row], options: dict[str, Any], reason: str
) -> None:
    decisions = decide(rows, Pair(**options))
    assert {decisions[row["candidate_id"]] for row in rows if row["verdict"] == "aligned"} <= {reason, None}
    assert reason in decisions.values()
    assert videos_by_strategy(rows, Pair(**options))["adaptive"] == 0


@pytest.mark.parametrize("precedence", ["video", "both"])
def test_a_text_pair_that_does_not_come_first_changes_nothing(precedence: str) -> None:
    rows = [candidate(0), candidate(1), misaligned(2)]
    assert decide(rows, Pair(precedence=precedence)) == {"c0": None, "c1": None, "c2": None}


def test_one_of_two_equal_prompts_is_rendered() -> None:
    rows = [candidate(0, "same"), candidate(1, "same"), candidate(2), candidate(3, "same")]
    assert decide(rows, ANY) == {"c0": None, "c1": TWIN, "c2": None, "c3": TWIN}
    assert decide([candidate(0, "same"), candidate(1, "same")], ANY) == {"c0": ALONE, "c1": TWIN}


OUTCOMES = st.one_of(st.integers(0, 3).map(float), st.just("failed"), st.just("misaligned"))


def finish(row: Row, outcome: Any) -> Row:
    if outcome == "failed":
        return {**row, "error": "black frames", "error_stage": "render"}
    return scored(row["k"], outcome, prompt=row["prompt"])


def as_rendered(outcomes: list[Any]) -> list[Any]:
    """Equal prompts (every fourth) have one video, and so one outcome."""
    first: dict[int, Any] = {}
    return [o if o == "misaligned" else first.setdefault(k % 4, o) for k, o in enumerate(outcomes)]


def run(outcomes: list[Any], pair: Pair, order: random.Random) -> list[Row]:
    """A query from its verdicts to its end. Of what may be rendered, a random part is done before
    the decision is made anew, as when a run is killed and goes on."""
    rows = [
        misaligned(k, "unsafe") if outcome == "misaligned" else candidate(k, f"prompt {k % 4}")
        for k, outcome in enumerate(outcomes)
    ]
    while True:
        decisions = decide(rows, pair)
        now = [
            k
            for k, row in enumerate(rows)
            if row["verdict"] == "aligned" and decisions.get(row["candidate_id"], "wait") is None
        ]
        if not now:
            return rows
        for k in order.sample(now, order.randint(1, len(now))):
            rows[k] = finish(rows[k], outcomes[k])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(OUTCOMES, min_size=1, max_size=7),
    st.sampled_from([0.5, 1.5]),
    st.integers(1, 2),
    st.sampled_from(["first", "best"]),
    st.integers(),
)
def test_it_finds_as_many_pairs_as_rendering_all(
    outcomes: list[Any], margin: float, wanted: int, choice: Any, seed: int
) -> None:
    outcomes = as_rendered(outcomes)
    pair = Pair(margin=margin, dominance="none", video_per_query=wanted, choice=choice)
    once, other = (run(outcomes, pair, random.Random(seed + i)) for i in range(2))
    assert once == other, "the same videos, whatever is finished first"
    everything = [
        finish(row, outcome) if row["verdict"] == "aligned" else row
        for row, outcome in zip(run(outcomes, NO_VIDEOS, random.Random(0)), outcomes, strict=True)
    ]
    found, all_found = (pairs_of_query(rows, pair, Counter()) for rows in (once, everything))
    assert len(found) == len(all_found)
    told = videos_by_strategy(everything, pair)
    assert told == videos_by_strategy(once, pair), "either run tells it"
    made = sum(row["video_key"] is not None or row["error"] is not None for row in once)
    assert made == told["adaptive"] <= told["all"]
