"""The table of an evaluation on the terminal."""

import json
import math

import pytest
from made_samples import answer, context, noisy, sample
from rich.cells import cell_len

from vpo_ray.evaluation.figures import NOTHING_OUTSIDE, results_of
from vpo_ray.evaluation.results_table import log_text, table_text
from vpo_ray.recipe import Evaluation

FEW = Evaluation(resamples=1000)
GOLDEN = """\
eval, render (tiny): 40 queries

     errors            aligned*              unsafe*             prompt.words
sft  0.0% [0.0, 8.8]   100.0% [91.2, 100.0]  0.0% [0.0, 8.8]     20
dpo  5.0% [1.4, 16.5]  75.0% [59.8, 85.8]    25.0% [14.2, 40.2]  31.07 [30.65, 31.50]

     clip                  reward*
sft  0.450 [0.365, 0.537]  0.5
dpo  0.542 [0.453, 0.630]  0.690 [0.675, 0.700]
zero for every policy: imprecise*, refusal*, none*

dpo failed: 2 render: lost

against sft            difference              win/tie/loss  p (Holm)  detectable
dpo  errors            +5.0pt [0.0, 12.5]      0/38/2        0.500     10.2pt
     aligned*          -25.0pt [-37.5, -12.5]  0/30/10       0.006     22.7pt      worse
     unsafe*           +25.0pt [12.5, 37.5]    0/30/10       0.006     22.7pt      worse
     clip              +0.092 [0.080, 0.100]   38/1/1        <0.001    0.0159      better
     reward*           +0.190 [0.175, 0.200]   38/2/0        <0.001    0.0201      better
     preference.video  +75.0pt [62.5, 87.5]    30/10/0       <0.001    39.3pt      better
dpo against sft, preference.video: 25% of the answers change with the order

* the training's own reward or judge: what the policies were trained to please
sign: dpo's prompts are longer
warning: eval, render: dpo has no clip and no reward of 2 of 40 samples, which count as the worst
  value seen: 2 render: lost
"""


FOR_A_LOG = """\
eval, render (tiny): 40 queries
     errors  aligned*  unsafe*  prompt.words  clip   reward*
sft  0.0%    100.0%    0.0%     20            0.45   0.5
dpo  5.0%    75.0%     25.0%    31.1          0.542  0.69
dpo failed: 2 render: lost
dpo against sft: better clip +0.092 [0.080, 0.100], reward* +0.190 [0.175, 0.200], preference.video \
+75.0pt [62.5, 87.5]; worse aligned* -25.0pt [-37.5, -12.5], unsafe* +25.0pt [12.5, 37.5]
warning: eval, render: dpo has no clip and no reward of 2 of 40 samples, which count as the worst value \
seen: 2 render: lost
"""


def rows_of_two() -> list:
    rows = []
    for number in range(40):
        query = f"query {number}"
        wave = (number % 10) / 10
        rows.append(sample("sft", query, {"reward": 0.5, "clip": wave, "prompt.words": 20.0}))
        measures = {"reward": 0.7, "clip": wave + 0.1, "prompt.words": 29.0 + number % 5}
        more = {"verdict": "unsafe"} if number % 4 == 0 else {}
        if number < 2:
            measures, more = {"prompt.words": 31.0}, {"error": "lost", "error_stage": "render", **more}
        rows.append(sample("dpo", query, measures, **more))
    return rows


def test_the_table() -> None:
    answers = [
        row
        for number in range(40)
        for row in (
            answer("sft", "dpo", f"query {number}", "b"),
            answer("dpo", "sft", f"query {number}", "a" if number < 30 else "b"),
        )
    ]
    results = results_of(rows_of_two(), answers, FEW, context("sft", "dpo"))
    results["signs"] = ["dpo's prompts are longer"]
    assert table_text(results, 100) == GOLDEN
    assert log_text(results) == FOR_A_LOG


def test_a_measure_in_which_no_query_differs_takes_no_line_of_its_own() -> None:
    rows = [
        sample(policy, f"query {n}", {"reward": 0.5, "clip": float(policy == "dpo")}, verdict="imprecise")
        for policy in ("sft", "dpo")
        for n in range(5)
    ]
    text = table_text(results_of(rows, [], FEW, context("sft", "dpo")), 120)
    assert "dpo against sft, no query differs in imprecise*, reward*\n" in text
    assert "all 5 queries tie" not in text


def test_the_first_line_says_when_nothing_is_from_outside() -> None:
    rows = [sample(name, "a cat", {"reward": 1.0}) for name in ("sft", "dpo")]
    text = table_text(results_of(rows, [], FEW, context("sft", "dpo")), 200)
    assert text.splitlines()[0] == f"Note: {NOTHING_OUTSIDE}."
    assert text.count(NOTHING_OUTSIDE) == 1
    assert "reward*: one query only" in text


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_lines_are_as_wide_as_the_terminal_at_most(width: int) -> None:
    rows = noisy(["query", "base", "few_shot", "sft", "dpo"], 12)
    results = results_of(rows, [], FEW, context("query", "base", "few_shot", "sft", "dpo"))
    results["warnings"] += ["一只猫在屋顶上 " * 20, "a\x1b[31mred\x1b[0m line"]
    text = table_text(results, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert all(character.isprintable() or character == "\n" for character in text)


def test_results_of_a_file_give_the_same_table() -> None:
    results = results_of(noisy(["sft", "dpo"], 30), [], FEW, context("sft", "dpo"))
    assert table_text(json.loads(json.dumps(results, sort_keys=True)), 100) == table_text(results, 100)


def test_nothing_to_show_is_a_dash() -> None:
    rows = [sample("sft", "a cat", {"reward": 1.0}), sample("dpo", "a cat", {"reward": math.nan})]
    text = table_text(results_of(rows, [], FEW, context("sft", "dpo")), 200)
    assert "dpo failed: 1 reward is nan" in text
    assert "nan " not in text.replace("reward is nan", "")
