"""Curation as a step of a run: raw queries into `queries/` and `dropped/`, with the judge's labels.

Where the judge labels unsafe queries, curation runs twice: once to find what is left to label, and
once more, with the labels, to choose the subset.
"""

from __future__ import annotations

import logging

from vpo_ray.chains import Models
from vpo_ray.recipe import Recipe
from vpo_ray.stages.curate import Curated, InputError, curate
from vpo_ray.storage import RunDir

logger = logging.getLogger(__name__)

CURATED = "queries/curated.json"
UNLABELLED = "unlabelled/curated.json"
ROWS_PER_PART = 10_000


def curate_run(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> None:
    """Fill `queries/` and `dropped/`. Finished once, they are kept: input that changes later asks for
    a new run directory.

    Raises:
        InputError, RulesError: see `curate.curate`; or no query is left.
        GenerationError: the judge cannot label.
    """
    labels = _labels(recipe, run, retry_errors) if recipe.queries.unsafe_judge else None
    curated = curate(recipe.queries, labels)
    counts = {"queries": _store(run, "queries", curated), "dropped": 0}
    for part in curated.dropped(ROWS_PER_PART):
        run.table("dropped").append(part)
        counts["dropped"] += len(part)
    for what, number in curated.counts().most_common():
        logger.info("curate: %8d %s", number, what)
    if not counts["queries"]:
        raise InputError(
            f"queries.path {recipe.queries.path}: all {counts['dropped']} rows were dropped, "
            f"see the reasons in {run.uri}/dropped"
        )
    run.write_json(CURATED, counts)


def _labels(recipe: Recipe, run: RunDir, retry_errors: bool) -> dict[str, bool]:
    """What the judge says of every query that the rules keep, by query id."""
    from vpo_ray.pipeline import generate

    if not run.exists(UNLABELLED):
        everything = recipe.queries.model_copy(update={"size": None, "unsafe_share": None})
        run.write_json(UNLABELLED, {"queries": _store(run, "unlabelled", curate(everything))})
    generate(recipe, run, Models("", ""), ("label",), retry_errors)
    rows = run.table("labels").rows(["query_id", "unsafe"])
    return {row["query_id"]: row["unsafe"] for row in rows if row["unsafe"] is not None}


def _store(run: RunDir, name: str, curated: Curated) -> int:
    stored = 0
    for part in curated.queries(ROWS_PER_PART):
        run.table(name).append(part)
        stored += len(part)
    return stored
