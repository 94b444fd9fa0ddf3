"""Evaluations of several seeds as one."""

import pytest
from made_samples import context, sample

from vpo_ray.evaluation.blocks import FiguresError
from vpo_ray.evaluation.evaluate import Evaluated, samples_of
from vpo_ray.evaluation.figures import results_of
from vpo_ray.evaluation.pooled import pool_evaluations
from vpo_ray.evaluation.statistics import mean_interval
from vpo_ray.recipe import Evaluation
from vpo_ray.storage.run_dir import RunDir

FEW = Evaluation(resamples=1000)


def evaluated(folder, values, seeds=1):
    """One of `sft` and `dpo` on two queries a row of values."""
    run = RunDir(str(folder))
    rows = [
        sample(policy, f"query {n}", {"truth": value + (policy == "dpo")}, seed=seed)
        for n, value in enumerate(values)
        for policy in ("sft", "dpo")
        for seed in range(seeds)
    ]
    samples_of(run).replace(rows)
    return Evaluated(run, results_of(rows, [], FEW, context("sft", "dpo")), [])


def test_all_seeds_of_a_query_are_one_unit(tmp_path):
    runs = [evaluated(tmp_path / "a", [0.0, 1.0, 2.0]), evaluated(tmp_path / "b", [4.0, 5.0, 9.0], seeds=2)]
    found = pool_evaluations(runs, FEW, RunDir(str(tmp_path / "all")))
    figure = found.results["results"]["eval"]["render"]["sft"]["truth"]
    expected = mean_interval([[0.0, 4.0, 4.0], [1.0, 5.0, 5.0], [2.0, 9.0, 9.0]], resamples=1000)
    assert figure["value"] == pytest.approx(expected.value)
    assert (figure["ci_low"], figure["ci_high"]) == pytest.approx((expected.low, expected.high), abs=0.2)
    assert figure["n"] == 3
    assert len(found.samples()) == 2 * 3 * 3
    assert found.folder.read_json("results.json")["comparisons"]


def test_evaluations_of_other_queries_are_refused(tmp_path):
    one, other = evaluated(tmp_path / "a", [0.0, 1.0]), evaluated(tmp_path / "b", [0.0, 1.0, 2.0])
    with pytest.raises(FiguresError):
        pool_evaluations([one, other], FEW, RunDir(str(tmp_path / "all")))
