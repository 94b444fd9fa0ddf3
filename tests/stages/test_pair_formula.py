"""Pairs by a formula, and the rule of Prompt-A-Video against a plain reference of its filter."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vpo_ray.recipe import Formula, Pair, load, pair_presets
from vpo_ray.recipe.formula import preset_formula
from vpo_ray.records import Row
from vpo_ray.stages.pair import pairs_of_query

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
# VideoScore's five, then LAION aesthetic and MPS.
SHORT = {"VQ": "visual_quality", "TC": "temporal_consistency", "DD": "dynamic_degree",
         "TVA": "text_alignment", "FC": "factual_consistency"}  # fmt: skip


def reference(prompts: list[str], scores: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What Prompt-A-Video's filter gives for one query, from its description.

    Totals are ordered; the first and the second may each be chosen where they pass all thresholds; each is
    set over all that are lower by more than 1.4; pairs whose chosen prompt is over 130 words are left out.
    """
    weights = {"VQ": 1.0, "TC": 1.0, "FC": 1.0, "DD": 1.1, "TVA": 1.3, "AES": 4 / 5, "MPS": 1 / 3}
    least = {"VQ": 2.6, "TC": 2.6, "FC": 2.55, "AES": 5.5, "TVA": 2.9, "MPS": 8.5, "DD": 2.65}
    totals = [sum(weight * row[name] for name, weight in weights.items()) for row in scores]
    order = sorted(range(len(totals)), key=lambda number: totals[number], reverse=True)
    found = []
    for place in (0, 1):
        best = order[place]
        if all(scores[best][name] > bound for name, bound in least.items()):
            found += [
                (prompts[best], prompts[lower])
                for lower in order[place + 1 :]
                if totals[best] - totals[lower] > 1.4
            ]
    return [(chosen, rejected) for chosen, rejected in found if len(chosen.split()) <= 130]


def feedback(k: int, prompt: str, scores: dict[str, float]) -> Row:
    videoscore = {
        "name": "videoscore",
        "score": 0.0,
        "dimensions": [{"name": name, "score": scores[short]} for short, name in SHORT.items()],
    }
    others = [{"name": name, "score": scores[key], "dimensions": []}
              for key, name in {"AES": "aesthetic", "MPS": "mps"}.items()]  # fmt: skip
    return {
        "candidate_id": f"q-{k}", "query_id": "q", "query": "a cat", "k": k, "prompt": prompt, "error": None,
        "refined_prompt": None, "refined_fault": None, "refined_verdict": None,
        "score": 1.0, "answers": None, "dimensions": None, "more_rewards": [videoscore, *others],
    }  # fmt: skip


def prompt_a_video() -> tuple[Pair, Formula]:
    formula = preset_formula("prompt_a_video", {"videoscore": None})
    return Pair.model_validate({"preset": "prompt_a_video"}), Formula.model_validate(formula)


def test_the_preset_gives_the_pairs_of_upstreams_filter() -> None:
    rule, formula = prompt_a_video()
    random = np.random.default_rng(5)
    centre = {"VQ": 2.75, "TC": 2.75, "DD": 2.8, "TVA": 3.05, "FC": 2.7, "AES": 5.8, "MPS": 9.5}
    counts: Counter[int] = Counter()
    for _ in range(150):
        length = random.integers(100, 150, 5)
        prompts = [" ".join([f"p{k}", *["word"] * (n - 1)]) for k, n in enumerate(length)]
        scores = [{name: float(random.normal(mean, 0.35)) for name, mean in centre.items()} for _ in range(5)]
        rows = [feedback(k, *one) for k, one in enumerate(zip(prompts, scores, strict=True))]
        found = [(row["chosen"], row["rejected"]) for row in pairs_of_query(rows, rule, Counter(), formula)]
        expected = reference(prompts, scores)
        assert sorted(found) == sorted(expected)
        counts[len(expected)] += 1
    assert counts[0] > 10
    assert sum(counts[n] for n in (2, 3, 4, 5)) > 10, "queries that teach several pairs"


SCORES = {"VQ": 3.0, "TC": 3.0, "DD": 3.0, "TVA": 3.2, "FC": 3.0, "AES": 6.0, "MPS": 10.0}
LOW = {**SCORES, "VQ": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"VQ": 2.6}, "chosen: videoscore.visual_quality not above 2.6"),
        ({"TC": 2.6}, "chosen: videoscore.temporal_consistency not above 2.6"),
        ({"FC": 2.55}, "chosen: videoscore.factual_consistency not above 2.55"),
        ({"DD": 2.65}, "chosen: videoscore.dynamic_degree not above 2.65"),
        ({"TVA": 2.9}, "chosen: videoscore.text_alignment not above 2.9"),
        ({"AES": 5.5}, "chosen: aesthetic not above 5.5"),
        ({"MPS": 8.5}, "chosen: mps not above 8.5"),
    ],
)
def test_each_threshold_is_strict_and_counted(change: dict[str, float], reason: str) -> None:
    rule, formula = prompt_a_video()
    reasons: Counter[str] = Counter()
    worse = {**LOW, "TC": 0.5}
    rows = [feedback(0, "good", {**SCORES, **change}), feedback(1, "bad", worse)]
    assert pairs_of_query(rows, rule, reasons, formula) == []
    assert reasons[reason] == 1
    above = {name: value + 0.001 for name, value in change.items()}
    rows[0] = feedback(0, "good", {**SCORES, **above})
    [pair] = pairs_of_query(rows, rule, Counter(), formula)
    assert (pair["chosen"], pair["rejected"]) == ("good", "bad")


def test_a_third_is_never_chosen_and_a_long_prompt_neither() -> None:
    rule, formula = prompt_a_video()
    rows = [feedback(k, f"p{k}", {**SCORES, "MPS": 30.0 - 5 * k}) for k in range(4)]
    found = {(row["chosen"], row["rejected"]) for row in pairs_of_query(rows, rule, Counter(), formula)}
    assert found == {("p0", "p1"), ("p0", "p2"), ("p0", "p3"), ("p1", "p2"), ("p1", "p3")}
    rows[0]["prompt"] = " ".join(["word"] * 131)
    reasons: Counter[str] = Counter()
    left = pairs_of_query(rows, rule, reasons, formula)
    assert {(row["chosen"], row["rejected"]) for row in left} == {("p1", "p2"), ("p1", "p3")}
    assert reasons["chosen: a prompt of more than 130 words"] == 3
    assert reasons["chosen not among the best"] == 1
    rows[0]["prompt"] = " ".join(["word"] * 130)
    assert len(pairs_of_query(rows, rule, Counter(), formula)) == 5


def test_margins_are_of_the_totals_and_do_not_depend_on_the_order() -> None:
    rule, formula = prompt_a_video()
    rows = [feedback(0, "bad", LOW), feedback(1, "good", SCORES)]
    found = pairs_of_query(rows, rule, Counter(), formula)
    assert [round(row["margin"], 6) for row in found] == [2.0]
    assert pairs_of_query(rows[::-1], rule, Counter(), formula) == found


def test_the_words_of_a_refined_prompt_count_too() -> None:
    row = {**feedback(0, "bad", LOW), "score": None, "refined_prompt": "a b c", "refined_verdict": "aligned"}
    assert len(pairs_of_query([row], Pair(max_words=3), Counter())) == 1
    assert pairs_of_query([row], Pair(max_words=2), Counter()) == []


def test_dimension_dominance_looks_at_what_each_term_adds() -> None:
    less_is_better = Formula.model_validate({"terms": {"mps": {"weight": -1}, "aesthetic": 3}})
    rule = Pair(by="formula", dominance="dimension")
    a, b = feedback(0, "a", {**SCORES, "MPS": 1.0}), feedback(1, "b", SCORES)
    assert [row["chosen"] for row in pairs_of_query([a, b], rule, Counter(), less_is_better)] == ["a"]
    b = feedback(1, "b", {**SCORES, "AES": 6.1})
    assert pairs_of_query([a, b], rule, Counter(), less_is_better) == []


# The recipe's shorthand


def test_a_preset_fills_what_is_not_given_and_the_formula() -> None:
    more = "more_rewards={aesthetic: {kind: vbench, dimensions: [dynamic_degree]}, mps: {kind: vbench, dimensions: [dynamic_degree]}}"  # noqa: E501
    recipe = load(TINY, ["pair={preset: prompt_a_video, margin: 2}", more])
    assert (recipe.pair.by, recipe.pair.choice, recipe.pair.ranks, recipe.pair.max_words) == (
        "formula",
        "all",
        2,
        130,
    )
    assert recipe.pair.margin == 2
    assert recipe.formula is not None
    assert next(iter(recipe.formula.terms)) == "reward.visual_quality", "VideoScore is the first reward here"
    own = load(TINY, ["pair={preset: prompt_a_video}", "formula={terms: {reward: 1}}"])
    assert own.formula is not None
    assert list(own.formula.terms) == ["reward"]
    assert load(TINY, ["pair={preset: vpo}"]).pair == Pair(preset="vpo"), "the defaults are VPO's"
    assert load(TINY, ["pair={preset: vpo}"]).pair.model_copy(update={"preset": None}) == Pair()


def test_every_preset_says_where_its_numbers_are_from() -> None:
    for name, preset in pair_presets().items():
        assert preset["sources"], name
        assert Pair.model_validate({"preset": name}).preset == name
