"""An evaluation's figures: recomputed from its samples, and honest where there is little to say."""

import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_samples import answer, context, noisy, sample
from scipy import stats

from vpo_ray.evaluation.blocks import FiguresError
from vpo_ray.evaluation.figures import NOTHING_OUTSIDE, results_of
from vpo_ray.evaluation.samples import COMPARISON, SAMPLE
from vpo_ray.recipe import Evaluation
from vpo_ray.records import VERDICTS, Row, query_id, table

FEW = Evaluation(resamples=2000)
QUERIES = [f"a cat, number {n}" for n in range(30)]


def entry(results: dict[str, Any], metric: str, b: str = "dpo", a: str = "sft") -> dict[str, Any]:
    (found,) = (e for e in results["comparisons"] if (e["metric"], e["a"], e["b"]) == (metric, a, b))
    return found


def close(ours: float | None, theirs: float) -> bool:
    return ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def near(ours: dict[str, Any], theirs: Any) -> bool:
    """Whether two bootstrap intervals agree but for their random numbers."""
    width = theirs.high - theirs.low
    return abs(ours["ci_low"] - theirs.low) < 0.1 * width and abs(ours["ci_high"] - theirs.high) < 0.1 * width


def bootstrap(values: list[float]) -> Any:
    rng = np.random.default_rng(1)
    return stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=rng
    ).confidence_interval


def recomputed(samples: list[Row], policy: str, measure: str, video: bool) -> dict[str, float]:
    """A policy's mean over seeds by query, by plain loops: a missing value is the lowest one seen."""
    seen = [
        m["value"]
        for row in samples
        for m in row["measures"]
        if m["name"] == measure and math.isfinite(m["value"])
    ]
    applies = {row["query"] for row in samples if video or any(m["name"] == measure for m in row["measures"])}
    by_query: dict[str, list[float]] = {}
    for row in samples:
        if row["policy"] != policy or row["query"] not in applies:
            continue
        found = [m["value"] for m in row["measures"] if m["name"] == measure and math.isfinite(m["value"])]
        by_query.setdefault(row["query"], []).append(found[0] if found else min(seen))
    return {query: sum(values) / len(values) for query, values in by_query.items()}


def by_query(samples: list[tuple[Row, Any]]) -> dict[str, float]:
    """The share of a query's samples that have something."""
    found: dict[str, list[bool]] = {}
    for row, has in samples:
        found.setdefault(row["query"], []).append(bool(has))
    return {query: sum(each) / len(each) for query, each in found.items()}


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_figure_follows_from_the_samples(seeds: int) -> None:
    policies = ["base", "sft", "dpo"]
    samples = noisy(policies, 80, seeds)
    results = results_of(samples, [], Evaluation(resamples=4000, seeds=seeds), context(*policies))
    figures = results["results"]["eval"]["render"]
    values: dict[tuple[str, str], dict[str, float]] = {}
    for policy in policies:
        own = [row for row in samples if row["policy"] == policy]
        for verdict in (*VERDICTS, "none"):
            has = [(row, (row["verdict"] or "none") == verdict) for row in own]
            values[policy, f"verdict.{verdict}"] = by_query(has)
        fails = [(row, row["error"] or any(math.isnan(m["value"]) for m in row["measures"])) for row in own]
        values[policy, "errors"] = by_query(fails)
        for measure in ("reward", "clip"):
            values[policy, measure] = recomputed(samples, policy, measure, True)
        for measure in ("prompt.words", "prompt.required_kept"):
            values[policy, measure] = recomputed(samples, policy, measure, False)
        assert figures[policy].keys() == {metric for name, metric in values if name == policy}
        assert close(sum(figures[policy][f"verdict.{v}"]["value"] for v in (*VERDICTS, "none")), 1)
    for (policy, metric), of_queries in values.items():
        found, each = figures[policy][metric], list(of_queries.values())
        assert close(found["value"], sum(each) / len(each)), (policy, metric)
        assert found["n"] == len(each)
        if set(each) <= {0.0, 1.0} and metric.split(".")[0] in ("errors", "verdict"):
            test = stats.binomtest(int(sum(each)), len(each))
            interval = test.proportion_ci(0.95, method="wilson")
            assert close(found["ci_low"], interval.low)
            assert close(found["ci_high"], interval.high)
        else:
            assert close(found["stderr"], stats.sem(each))
            assert near(found, bootstrap(each)) or len(set(each)) < 5  # of few values the steps are coarse
    assert len(results["comparisons"]) == 3 * len(figures["dpo"])
    ps = []
    for found in results["comparisons"]:
        first, second = (values[found[side], found["metric"]] for side in "ab")
        gaps = [round(second[query] - first[query], 12) for query in first]
        assert close(found["difference"], sum(gaps) / len(gaps)), found
        assert found["n"] == len(gaps)
        if found["metric"] == "prompt.words":
            assert {found[name] for name in ("win", "tie", "loss", "p", "p_holm")} == {None}
            continue
        better = -1 if results["higher_is_better"][found["metric"]] is False else 1
        win, loss = sum(gap * better > 0 for gap in gaps), sum(gap * better < 0 for gap in gaps)
        assert (found["win"], found["tie"], found["loss"]) == (win, len(gaps) - win - loss, loss)
        if win + loss == 0:
            assert found["p"] is None
            assert "tie" in found["note"]
            continue
        assert close(found["p"], stats.binomtest(win, win + loss).pvalue)
        ps.append(found)
        assert near(found, bootstrap(gaps)) or win + loss < 10  # of few values the steps are coarse
        spread = (
            math.sqrt(np.mean(np.square(gaps))) if set(gaps) <= {-1, 0, 1} else float(np.std(gaps, ddof=1))
        )
        quantiles = stats.t.ppf(0.975, len(gaps) - 1) + stats.t.ppf(0.8, len(gaps) - 1)
        assert close(found["smallest_detectable"], quantiles * spread / math.sqrt(len(gaps)))
    highest = 0.0
    for rank, found in enumerate(sorted(ps, key=lambda found: found["p"])):
        highest = max(highest, min(1.0, found["p"] * (len(ps) - rank)))
        assert close(found["p_holm"], highest)


def test_tables_give_what_rows_give() -> None:
    samples = noisy(["sft", "dpo"], 12)
    answers = [answer("sft", "dpo", samples[0]["query"], "b"), answer("dpo", "sft", samples[0]["query"], "a")]
    of_rows = results_of(samples, answers, FEW, context("sft", "dpo"))
    of_tables = results_of(
        table(samples[::-1], SAMPLE), table(answers[::-1], COMPARISON), FEW, context("sft", "dpo")
    )
    assert of_rows == of_tables
    assert isinstance(table(samples, SAMPLE), pa.Table)


def test_a_policy_that_fails_more_looks_worse() -> None:
    rows = []
    for number, query in enumerate(QUERIES):
        rows.append(sample("sft", query, {"reward": 0.5 + number / 100}))
        if number < 10:
            rows.append(sample("dpo", query, {"reward": 0.9}))
        elif number < 20:
            rows.append(sample("dpo", query, video_key=None, skipped="unsafe: not rendered"))
        else:
            rows.append(sample("dpo", query, video_key=None, error="lost /tmp/a1b2", error_stage="render"))
    results = results_of(rows, [], FEW, context("sft", "dpo"))
    dpo = results["results"]["eval"]["render"]["dpo"]
    assert dpo["reward"]["value"] == pytest.approx((10 * 0.9 + 20 * 0.5) / 30)
    assert (dpo["reward"]["n"], dpo["reward"]["filled"]) == (30, 20)
    assert dpo["reward"]["value_where_all_have_one"] == pytest.approx(0.9)
    assert dpo["reward"]["n_where_all_have_one"] == 10
    assert dpo["errors"]["value"] == pytest.approx(1 / 3)
    assert results["errors"]["eval"]["render"] == {"sft": {}, "dpo": {"render: lost PATH": 10}}
    assert entry(results, "reward")["win"] == 10
    assert results["warnings"] == [
        NOTHING_OUTSIDE,
        "eval, render: dpo has no reward of 20 of 30 samples, which count as the worst value seen: 10 "
        "render: lost PATH, 10 unsafe: not rendered",
    ]


def test_what_no_policy_could_render_counts_too() -> None:
    rows = [sample("dpo", query, {"reward": 0.9}) for query in QUERIES[:10]]
    rows += [sample("dpo", QUERIES[10], {"reward": 0.1})]
    rows += [sample("dpo", query, video_key=None, error="lost") for query in QUERIES[11:20]]
    figures = results_of(rows, [], FEW, context("dpo"))["results"]["eval"]["render"]["dpo"]
    assert figures["reward"]["value"] == pytest.approx((9 + 0.1 + 0.9) / 20)


def test_a_measure_of_some_queries_is_missing_nowhere_else() -> None:
    rows = []
    for policy in ("sft", "dpo"):
        rows += [sample(policy, query, {"vbench.color": 0.5, "reward": 1.0}) for query in QUERIES[:5]]
        rows += [sample(policy, query, {"reward": 1.0}) for query in QUERIES[5:]]
    results = results_of(rows, [], FEW, context("sft", "dpo"))
    assert results["results"]["eval"]["render"]["dpo"]["vbench.color"]["n"] == 5
    assert results["warnings"] == []


def test_a_score_that_is_no_number_is_a_failure() -> None:
    rows = [sample("sft", query, {"reward": 1.0}) for query in QUERIES[:4]]
    for query, value in zip(QUERIES, (math.nan, math.inf, 2.0, 3.0), strict=False):
        rows.append(sample("dpo", query, {"reward": value}))
    results = results_of(rows, [], FEW, context("sft", "dpo"))
    dpo = results["results"]["eval"]["render"]["dpo"]
    assert dpo["reward"]["value"] == pytest.approx((1 + 1 + 2 + 3) / 4)
    assert dpo["errors"]["value"] == 0.5
    assert results["errors"]["eval"]["render"]["dpo"] == {"reward is inf": 1, "reward is nan": 1}


def test_few_queries_ties_and_constants_say_so() -> None:
    one = results_of(
        [sample(name, "a cat", {"reward": 1.0}) for name in ("sft", "dpo")], [], FEW, context("sft", "dpo")
    )
    reward = one["results"]["eval"]["render"]["dpo"]["reward"]
    assert (reward["value"], reward["stderr"], reward["ci_low"], reward["note"]) == (
        1,
        None,
        None,
        "one query only",
    )
    assert entry(one, "reward")["p"] is None
    tied = results_of(
        [sample(name, query, {"reward": 1.0}) for name in ("sft", "dpo") for query in QUERIES],
        [],
        FEW,
        context("sft", "dpo"),
    )
    assert tied["results"]["eval"]["render"]["dpo"]["reward"]["note"] == "constant"
    found = entry(tied, "reward")
    assert found["note"] == "all 30 queries tie"
    assert {
        found[name] for name in ("stderr", "ci_low", "ci_high", "p", "p_holm", "smallest_detectable")
    } == {None}


def test_policies_that_answered_different_queries_are_refused() -> None:
    rows = [sample("sft", query) for query in QUERIES[:4]] + [sample("dpo", query) for query in QUERIES[1:4]]
    with pytest.raises(FiguresError, match=r"dpo has no sample of 1 that another has: 'a cat, number 0'"):
        results_of(rows, [], FEW, context("sft", "dpo"))
    with pytest.raises(FiguresError, match="two samples of the query 'a cat, number 1'"):
        results_of([*rows, rows[-3]], [], FEW, context("sft", "dpo"))
    with pytest.raises(FiguresError, match="'sft', which is no policy"):
        results_of(rows, [], FEW, context("dpo"))
    with pytest.raises(FiguresError, match="no samples"):
        results_of([], [], FEW, context("dpo"))


def test_the_training_s_own_measures_are_marked() -> None:
    measures = {"reward": 1.0, "reward.physics": 1.0, "clip": 1.0, "prompt.words": 9.0}
    rows = [sample(name, query, measures) for name in ("sft", "dpo") for query in QUERIES[:3]]
    own = results_of(rows, [], FEW, context("sft", "dpo", training_rewards=["reward", "clip"]))
    verdicts = [f"verdict.{name}" for name in sorted((*VERDICTS, "none"))]
    assert own["trained_on"] == ["clip", "reward", "reward.physics", *verdicts]
    assert own["warnings"] == [NOTHING_OUTSIDE]
    outside = results_of(rows, [], FEW, context("sft", "dpo"))
    assert outside["trained_on"] == ["reward", "reward.physics", *verdicts]
    assert outside["warnings"] == []
    judge = {"model": "j", "backend": "openai"}
    preference = Evaluation.model_validate(
        {"policies": ["sft", "dpo"], "prefer_videos": {"llm": judge}, "judge": judge, "resamples": 1000}
    )
    answers = [answer("sft", "dpo", QUERIES[0], "a"), answer("dpo", "sft", QUERIES[0], "b")]
    trained = results_of(rows, answers, preference, context("sft", "dpo", training_judge="j"))
    assert trained["trained_on"] == ["preference.video", "reward", "reward.physics"]
    people = results_of(rows, [], FEW, context("sft", "dpo"), people=answers[:1])
    assert "people.video" not in people["trained_on"]


def both_orders(a: str, b: str, query: str, first: str | None, second: str | None) -> list[Row]:
    """Answers by place: where a was shown first, and where b was."""
    return [answer(a, b, query, first), answer(b, a, query, second)]


def test_a_verdict_that_flips_with_the_order_is_a_tie() -> None:
    rows = [sample(name, query) for name in ("sft", "dpo") for query in QUERIES]
    answers = []
    for number, query in enumerate(QUERIES[:24]):
        # 12 for dpo, 4 for sft, 8 for whatever is shown first.
        order = ("b", "a") if number < 12 else ("a", "b") if number < 16 else ("a", "a")
        answers += both_orders("sft", "dpo", query, *order)
    answers += both_orders("dpo", "sft", QUERIES[24], "a", None)
    found = entry(results_of(rows, answers, FEW, context("sft", "dpo")), "preference.video")
    assert (found["win"], found["tie"], found["loss"]) == (12, 8, 4)
    assert found["p"] == pytest.approx(stats.binomtest(12, 16).pvalue)
    assert found["flip_rate"] == pytest.approx(8 / 24)
    assert found["unanswered"] == 1
    assert found["difference"] == pytest.approx(8 / 24)


def test_a_policy_without_a_video_loses_unasked() -> None:
    rows = [sample("sft", query) for query in QUERIES]
    rows += [sample("dpo", query, video_key=None, error="lost") for query in QUERIES[:10]]
    rows += [sample("dpo", query) for query in QUERIES[10:]]
    answers = [row for query in QUERIES[10:] for row in both_orders("sft", "dpo", query, "b", "a")]
    found = entry(results_of(rows, answers, FEW, context("sft", "dpo")), "preference.video")
    assert (found["win"], found["tie"], found["loss"]) == (20, 0, 10)


def test_a_position_bias_changes_no_winner() -> None:
    """A judge that takes the first one on 20 % of queries, whatever they are."""
    rng = random.Random(1)
    rows, answers, truth = [], [], {"b": 0, "a": 0}
    for query in (f"query {n}" for n in range(300)):
        rows += [sample("sft", query), sample("dpo", query)]
        better = "b" if rng.random() < 0.65 else "a"
        truth[better] += 1
        biased = rng.random() < 0.2
        answers += both_orders(
            "sft", "dpo", query, *(("a", "a") if biased else ("a", "b") if better == "a" else ("b", "a"))
        )
    found = entry(results_of(rows, answers, FEW, context("sft", "dpo")), "preference.video")
    assert truth["b"] > truth["a"]
    assert found["win"] > found["loss"]
    assert found["ci_low"] > 0


def test_people_decide_by_majority() -> None:
    rows = [sample(name, query) for name in ("sft", "dpo") for query in QUERIES[:3]]
    votes = [
        answer("sft", "dpo", QUERIES[0], "b", by="Ada"),
        answer("sft", "dpo", QUERIES[0], "b", by="Bo"),
        answer("sft", "dpo", QUERIES[0], "a", by="Cy"),
        answer("dpo", "sft", QUERIES[1], "a", by="Ada"),
        answer("dpo", "sft", QUERIES[1], "b", by="Bo"),
    ]
    found = entry(results_of(rows, [], FEW, context("sft", "dpo"), votes), "people.video")
    assert (found["win"], found["tie"], found["loss"], found["n"]) == (1, 1, 0, 2)
    assert (found["raters"], found["votes"]) == (3, 5)
    assert found["agreement"]["share"] == pytest.approx(1 / 4)


def test_three_policies_have_an_order() -> None:
    policies = ["base", "sft", "dpo"]
    rows = [sample(name, query) for name in policies for query in QUERIES]
    answers = []
    for number, query in enumerate(QUERIES):
        for a, b in combinations(policies, 2):
            answers += both_orders(a, b, query, *(("b", "a") if number % 10 else ("a", "b")))
    (found,) = results_of(rows, answers, FEW, context(*policies))["ranking"]
    assert [each["policy"] for each in found["policies"]] == ["dpo", "sft", "base"]
    strengths = [each["strength"] for each in found["policies"]]
    assert strengths[1] == pytest.approx(0)
    assert all(each["ci_low"] < each["strength"] < each["ci_high"] for each in found["policies"])


def test_prompts_are_compared_once_whatever_the_video_model_and_seed() -> None:
    rows = [
        sample(name, query, {"reward": 1.0}, seed, video_model=model)
        for name in ("sft", "dpo")
        for query in QUERIES[:4]
        for seed in (0, 1)
        for model in ("render", "other")
    ]
    answers = [
        {**row, "what": "prompt", "video_model": "any"}
        for query in QUERIES[:4]
        for row in both_orders("sft", "dpo", query, "b", "a")
    ]
    results = results_of(rows, answers, FEW, context("sft", "dpo"))
    found = entry(results, "preference.prompt")
    assert (found["video_model"], found["n"], found["win"]) == ("render", 4, 4)
    with pytest.raises(FiguresError, match="video model 'any', of which there are no samples"):
        results_of(rows, [{**answers[0], "what": "video"}], FEW, context("sft", "dpo"))
    with pytest.raises(FiguresError, match="an answer about sft and dpo on the query"):
        results_of(rows, [{**answers[0], "query_id": query_id("none")}], FEW, context("sft", "dpo"))


def test_many_policies_are_compared_with_the_first_one() -> None:
    names = ["query", "base", "few_shot", "sft", "dpo"]
    rows = [sample(name, query) for name in names for query in QUERIES[:2]]
    pairs = {(e["a"], e["b"]) for e in results_of(rows, [], FEW, context(*names))["comparisons"]}
    assert pairs == {("query", name) for name in names[1:]}


def test_seeds_have_a_variance_of_their_own() -> None:
    rows = noisy(["dpo"], 20, 3, failing=0)
    figures = results_of(rows, [], FEW, context("dpo"))["results"]["eval"]["render"]["dpo"]
    assert figures["reward"]["variance_of_seeds"] > 0


def test_signs_follow_the_order_of_training() -> None:
    """Whatever the order in which the recipe names the policies."""
    rows = []
    for query in QUERIES:
        for name, words in (("dpo", 40), ("base", 10), ("sft", 10)):
            prompt = f"{query} " + " ".join(
                random.Random(query + name).choices("abcdefghijklmnopqrst", k=words)
            )
            rows.append(sample(name, query, {"reward": 1.0}, prompt=prompt))
    found = results_of(rows, [], FEW, context("dpo", "base", "sft"))["signs"]
    assert any(text.startswith("dpo's prompts are ") and " as long as sft's" in text for text in found)
    assert not any("base's prompts" in text for text in found)


def test_the_paper_s_differences_that_500_queries_cannot_show() -> None:
    """VPO's Table 2 for CogVideoX-5B: 94.8 % aligned, 93.8 % after SFT, 92.8 % without text feedback."""
    shares = {
        "sft": {"aligned": 469, "unsafe": 4, "imprecise": 27},
        "without_text": {"aligned": 464, "unsafe": 6, "imprecise": 30},
        "vpo": {"aligned": 474, "unsafe": 2, "imprecise": 24},
    }
    rows = []
    for at, (name, counts) in enumerate(shares.items()):
        verdicts = [verdict for verdict, count in counts.items() for _ in range(count)]
        random.Random(at).shuffle(verdicts)
        rows += [
            sample(name, f"query {n}", verdict=verdict, video_key=None) for n, verdict in enumerate(verdicts)
        ]
    results = results_of(rows, [], Evaluation(videos=False, resamples=2000), context(*shares))
    figures = results["results"]["eval"]["render"]
    assert figures["vpo"]["verdict.aligned"]["value"] == 0.948
    assert figures["vpo"]["verdict.unsafe"]["value"] == 0.004
    assert figures["sft"]["verdict.imprecise"]["value"] == 0.054
    for a, b in combinations(shares, 2):
        found = entry(results, "verdict.aligned", b, a)
        assert abs(found["difference"]) < found["smallest_detectable"]
        assert found["p_holm"] > 0.05
    assert entry(results, "verdict.aligned", "vpo", "sft")["smallest_detectable"] > 0.002


def test_a_reward_that_rises_while_another_measure_falls_is_a_sign() -> None:
    rng = random.Random(4)
    rows = []
    for query in QUERIES:
        for policy, reward, truth in (("sft", 0.0, 0.9), ("dpo", 2.0, 0.4)):
            measures = {"reward": rng.gauss(reward, 0.3), "truth": rng.gauss(truth, 0.1)}
            rows.append(sample(policy, query, measures))
    found = results_of(rows, [], FEW, context("sft", "dpo"))["signs"]
    assert (
        "from sft to dpo scores part ways: reward got better and truth worse, with intervals apart"
        in " ".join(found)
    )
