"""Pairs are of one query, follow VPO's rules, and do not depend on the order of candidates."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.recipe import Pair
from vpo_ray.records import PAIR, Row, table
from vpo_ray.stages.pair import dominates, pairs_of_query

VPO = Pair()
QUESTIONS = 4


def candidate(k: int, prompt: str = "", query: str = "q", **more: Any) -> Row:
    return {
        "candidate_id": f"{query}-{k}",
        "query_id": query,
        "query": f"text of {query}",
        "k": k,
        "prompt": prompt or f"prompt {k}",
        "refined_prompt": None,
        "refined_fault": None,
        "refined_verdict": None,
        "answers": None,
        "dimensions": None,
        "score": None,
        "error": None,
        **more,
    }


def scored(k: int, score: float, answers: str = "", **more: Any) -> Row:
    """A candidate with a video. `answers` such as "yyn", one letter a question."""
    listed = [{"question": i, "yes": letter == "y"} for i, letter in enumerate(answers, 1)]
    return candidate(k, score=score, answers=listed, **more)


def refined(k: int, verdict: str | None = "aligned", text: str = "", **more: Any) -> Row:
    return candidate(k, refined_prompt=text or f"refined {k}", refined_verdict=verdict, **more)


def pairs(*rows: Row, **options: Any) -> list[tuple[str, str, str]]:
    found = pairs_of_query(rows, Pair(**{"dominance": "none", **options}), Counter())
    assert table(found, PAIR).num_rows == len({row["pair_id"] for row in found})
    return [(row["kind"], row["chosen"], row["rejected"]) for row in found]


def test_the_reward_that_the_recipe_names_decides() -> None:
    def other(score: float | None) -> list[Row]:
        return [] if score is None else [{"name": "vlm", "score": score, "answers": [], "dimensions": []}]

    rows = [scored(k, 1.0 - k, more_rewards=other(score)) for k, score in enumerate([0.0, 2.0, None])]
    assert pairs(*rows)[0][1:] == ("prompt 0", "prompt 1")
    assert pairs(*rows, reward="vlm") == [("video", "prompt 1", "prompt 0")]


def why(*rows: Row, **options: Any) -> dict[str, int]:
    reasons: Counter[str] = Counter()
    pairs_of_query(rows, Pair(**options), reasons)
    return dict(reasons)


# VPO's rules by example


def test_the_defaults_are_those_of_vpo() -> None:
    """Margin: paper 3.3. Question dominance, first pair, one of each, text first: its code only."""
    assert VPO.model_dump() == {
        "preset": None,
        "by": "score",
        "reward": None,
        "ranks": None,
        "max_words": None,
        "margin": 0.5,
        "dominance": "question",
        "choice": "first",
        "video_per_query": 1,
        "text_per_query": 1,
        "precedence": "text",
        "also": None,
    }


def test_a_better_video_makes_a_pair() -> None:
    assert pairs(scored(0, 3.0), scored(1, 4.0)) == [("video", "prompt 1", "prompt 0")]


def test_the_margin_must_be_exceeded() -> None:
    assert pairs(scored(0, 3.0), scored(1, 3.5)) == []
    assert pairs(scored(0, 3.0), scored(1, 3.5), margin=0.49) != []
    assert why(scored(0, 3.0), scored(1, 3.5)) == {"margin too small": 1, "query without a video pair": 1}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_makes_no_pair(number: float) -> None:
    rows = [scored(0, 1.0), scored(1, number), scored(2, 3.0)]
    assert pairs(*rows, choice="all", margin=0) == [("video", "prompt 2", "prompt 0")]


def test_equal_scores_make_no_pair_even_without_a_margin() -> None:
    assert pairs(scored(0, 3.0), scored(1, 3.0), margin=0) == []


def test_one_question_lost_breaks_dominance() -> None:
    better, worse = scored(0, 4.0, "yyyn"), scored(1, 3.0, "nnny")
    assert pairs(better, worse, dominance="question") == []
    assert pairs(better, worse, dominance="none") != []
    assert why(better, worse) == {"not dominant": 1, "query without a video pair": 1}
    assert pairs(scored(0, 4.0, "yyyy"), worse, dominance="question") == [("video", "prompt 0", "prompt 1")]


def test_question_dominance_needs_a_question_won() -> None:
    assert pairs(scored(0, 4.0, "yn"), scored(1, 3.0, "yn"), dominance="question") == []


def test_dimension_dominance_looks_at_sums_only() -> None:
    def with_dimensions(k: int, score: float, answers: str, **parts: float) -> Row:
        listed = [{"name": name, "score": value} for name, value in parts.items()]
        return scored(k, score, answers, dimensions=listed)

    better = with_dimensions(0, 4.0, "yyn", alignment=2.0, quality=2.0)
    worse = with_dimensions(1, 3.0, "nyy", alignment=1.0, quality=2.0)
    mixed = with_dimensions(2, 3.0, "nyy", alignment=0.5, quality=2.5)
    assert pairs(better, worse, dominance="dimension") == [("video", "prompt 0", "prompt 1")]
    assert pairs(better, mixed, dominance="dimension") == []
    assert pairs(better, worse, dominance="question") == []


def test_rewards_of_two_checklists_cannot_be_compared() -> None:
    assert not dominates(scored(0, 4.0, "yyy"), scored(1, 3.0, "nn"), "question")


def test_first_takes_the_first_in_order_and_best_the_widest() -> None:
    rows = [scored(0, 3.0), scored(1, 2.0), scored(2, 6.0)]
    assert pairs(*rows, choice="first") == [("video", "prompt 0", "prompt 1")]
    assert pairs(*rows, choice="best") == [("video", "prompt 2", "prompt 1")]
    assert pairs(*rows, choice="best", video_per_query=2) == [
        ("video", "prompt 2", "prompt 1"),
        ("video", "prompt 2", "prompt 0"),
    ]
    assert len(pairs(*rows, video_per_query=10)) == 3
    assert pairs(*rows, video_per_query=0) == []


def test_a_misaligned_prompt_loses_against_its_refinement() -> None:
    assert pairs(refined(0)) == [("text", "refined 0", "prompt 0")]


@pytest.mark.parametrize("verdict", ["unsafe", "imprecise", "refusal", None])
def test_a_refinement_that_is_not_aligned_teaches_nothing(verdict: str | None) -> None:
    assert pairs(refined(0, verdict)) == []
    assert why(refined(0, verdict))["refined prompt not aligned"] == 1


def test_a_refinement_that_changed_nothing_teaches_nothing() -> None:
    assert pairs(refined(0, text="prompt 0")) == []


def test_one_text_pair_a_query_and_not_always_the_first() -> None:
    """VPO shuffles; here content decides, so it is the same again but spread over k."""
    taken = set()
    for number in range(40):
        rows = [refined(k, query=f"q{number}") for k in range(4)]
        found = pairs(*rows)
        assert len(found) == 1
        assert found == pairs(*rows[::-1])
        taken.add(found[0][1])
    assert taken == {f"refined {k}" for k in range(4)}
    assert len(pairs(*(refined(k) for k in range(4)), text_per_query=3)) == 3


MIXED = (scored(0, 3.0), scored(1, 4.0), refined(2))
TEXT = ("text", "refined 2", "prompt 2")
VIDEO = ("video", "prompt 1", "prompt 0")


@pytest.mark.parametrize(
    ("precedence", "expected"), [("text", [TEXT]), ("video", [VIDEO]), ("both", [TEXT, VIDEO])]
)
def test_precedence(precedence: str, expected: list[Any]) -> None:
    assert pairs(*MIXED, precedence=precedence) == expected


def test_the_pair_that_is_superseded_is_counted() -> None:
    assert why(*MIXED, dominance="none") == {"superseded by the text pair": 1}


@pytest.mark.parametrize("precedence", ["text", "video"])
def test_precedence_over_nothing_keeps_what_there_is(precedence: str) -> None:
    assert pairs(*MIXED[:2], precedence=precedence) == [VIDEO]
    assert pairs(MIXED[2], precedence=precedence) == [TEXT]


def test_one_prompt_sampled_twice_is_no_pair() -> None:
    assert pairs(scored(0, 3.0, prompt="same"), scored(1, 4.0, prompt="same")) == []


def test_the_first_of_two_equal_pairs_is_kept() -> None:
    rows = [scored(0, 3.0, prompt="low"), scored(1, 4.0, prompt="high"), scored(2, 4.0, prompt="high")]
    found = pairs_of_query(rows, Pair(dominance="none", video_per_query=5), Counter())
    assert [(row["chosen_id"], row["rejected_id"]) for row in found] == [("q-1", "q-0")]


@pytest.mark.parametrize("rows", [[], [scored(0, 3.0)], [scored(0, 3.0), candidate(1)]])
def test_nothing_to_compare(rows: list[Row]) -> None:
    assert pairs(*rows) == []
    assert why(*rows) == {"fewer than two scored videos": 1}


# Any set of candidates

PROMPTS = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def candidates(draw: st.DrawFn) -> Row:
    prompt = draw(PROMPTS)
    row = candidate(0, prompt)
    if draw(st.booleans()):
        row["refined_prompt"] = draw(PROMPTS)
        row["refined_verdict"] = draw(st.sampled_from(["aligned", "imprecise", None]))
    else:
        yes = draw(st.lists(st.booleans(), min_size=QUESTIONS, max_size=QUESTIONS))
        row["answers"] = [{"question": i, "yes": value} for i, value in enumerate(yes, 1)]
        halves = [sum(yes[:2]) / 2, sum(yes[2:]) / 2]
        row["dimensions"] = [{"name": str(i), "score": value} for i, value in enumerate(halves)]
        row["score"] = draw(st.sampled_from([None, sum(halves), sum(halves) + 0.25]))
    row["error"] = draw(st.sampled_from([None, None, None, "boom"]))
    return row


OPTIONS = st.builds(
    Pair,
    margin=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dominance=st.sampled_from(["none", "question", "dimension"]),
    choice=st.sampled_from(["first", "best"]),
    ranks=st.sampled_from([None, 1, 2]),
    video_per_query=st.integers(0, 3),
    text_per_query=st.integers(0, 3),
    precedence=st.sampled_from(["text", "video", "both"]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(candidates(), max_size=6), OPTIONS, st.randoms())
def test_what_holds_for_any_candidates(rows: list[Row], options: Pair, random: Any) -> None:
    rows = [{**row, "k": k, "candidate_id": f"q-{k}"} for k, row in enumerate(rows)]
    by_id = {row["candidate_id"]: row for row in rows}
    reasons: Counter[str] = Counter()
    found = pairs_of_query(rows, options, reasons)
    shuffled = random.sample(rows, len(rows))
    again: Counter[str] = Counter()
    assert pairs_of_query(shuffled, options, again) == found
    assert again == reasons
    for pair in found:
        chosen, rejected = by_id[pair["chosen_id"]], by_id[pair["rejected_id"]]
        assert chosen["error"] is None
        assert rejected["error"] is None
        assert pair["chosen"] != pair["rejected"]
        assert pair["rejected"] == rejected["prompt"]
        assert (pair["query_id"], pair["query"]) == ("q", "text of q")
        if pair["kind"] == "text":
            assert chosen is rejected
            assert (pair["chosen"], pair["margin"]) == (chosen["refined_prompt"], None)
            assert chosen["refined_verdict"] == "aligned"
        else:
            assert pair["chosen"] == chosen["prompt"]
            assert pair["margin"] == chosen["score"] - rejected["score"] > options.margin
            assert dominates(chosen, rejected, options.dominance)
    kinds = Counter(pair["kind"] for pair in found)
    assert kinds["text"] <= options.text_per_query
    assert kinds["video"] <= options.video_per_query
    if options.precedence != "both":
        assert len(kinds) <= 1
    texts = [(pair["kind"], pair["chosen"], pair["rejected"]) for pair in found]
    assert len(texts) == len(set(texts))
    assert table(found, PAIR).num_rows == len({pair["pair_id"] for pair in found})


@settings(deadline=None, max_examples=100)
@given(st.lists(candidates(), max_size=5), OPTIONS)
def test_a_candidate_that_failed_changes_nothing(rows: list[Row], options: Pair) -> None:
    rows = [{**row, "k": k, "candidate_id": f"q-{k}"} for k, row in enumerate(rows)]
    broken = {**refined(9), "score": 99.0, "answers": [], "dimensions": [], "error": "boom"}
    assert pairs_of_query([*rows, broken], options, Counter()) == pairs_of_query(rows, options, Counter())


@settings(deadline=None, max_examples=100)
@given(st.lists(candidates(), min_size=2, max_size=6), st.sampled_from(["question", "dimension"]))
def test_dominance_is_an_order(rows: list[Row], level: str) -> None:
    done = [row for row in rows if row["answers"] is not None]
    for a in done:
        assert not dominates(a, a, level)
        for b in done:
            assert not (dominates(a, b, level) and dominates(b, a, level))
            for c in done:
                if dominates(a, b, level) and dominates(b, c, level):
                    assert dominates(a, c, level)
