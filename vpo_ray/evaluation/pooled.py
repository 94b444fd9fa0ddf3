"""Evaluations of several runs as one: the same policies on the same queries, trained with other seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vpo_ray.evaluation.evaluate import RESULTS, Evaluated, samples_of
from vpo_ray.evaluation.figures import results_of
from vpo_ray.recipe import Evaluation
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir

# What `results_of` computes; the rest of a results file is its context.
_COMPUTED = frozenset({
    "order", "confidence", "results", "errors", "comparisons", "ranking", "trained_on", "signs",
})  # fmt: skip


def pool_evaluations(evaluations: Sequence[Evaluated], settings: Evaluation, folder: RunDir) -> Evaluated:
    """One evaluation of all, written to `folder` as `results.json` and `samples`.

    A query's values of all seeds are resampled together, so that intervals are over queries. What is said of
    policies' identities is the first evaluation's.

    Raises:
        FiguresError: they answer different queries, see `blocks.blocks`.
    """
    rows = list(_samples(evaluations))
    first = evaluations[0]
    context = {key: value for key, value in first.results.items() if key not in _COMPUTED}
    results: dict[str, Any] = results_of(rows, [], settings, context)
    samples_of(folder).replace(rows, rows_per_part=10_000)
    folder.write_json(RESULTS, results)
    return Evaluated(folder, results, first.queries)


def _samples(evaluations: Sequence[Evaluated]) -> Iterator[Row]:
    """Each evaluation's samples under a seed of their own."""
    seeds = 0
    for evaluation in evaluations:
        rows = evaluation.samples()
        for row in rows:
            seed = seeds + row["seed"]
            yield {**row, "seed": seed, "sample_id": f"{row['sample_id']}-{seed}"}
        seeds += 1 + max(row["seed"] for row in rows)
