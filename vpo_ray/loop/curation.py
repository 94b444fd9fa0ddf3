"""Curation as a step of a run: raw queries into `queries/` and `dropped/`, with the judge's labels.

Where the judge labels unsafe queries, curation runs twice: once to find what is left to label, and
once more, with the labels, to choose the subset.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from vpo_ray.engines.video.weights import sampled
from vpo_ray.recipe import Recipe
from vpo_ray.records import content_id
from vpo_ray.stages.chains import Models
from vpo_ray.stages.curate import InputError, curate
from vpo_ray.stages.curate.read import query_files
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import CURATED, UNLABELLED, RunDir

logger = logging.getLogger(__name__)

MADE_WITH = "made_with/queries.json"
ROWS_PER_PART = 10_000


def curate_run(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> None:
    """Fill `queries/` and `dropped/`. Finished once, they are kept: input that changes later asks for
    a new run directory.

    Raises:
        InputError, RulesError: see `curate.curate`; or no query is left.
        GenerationError: the judge cannot label.
    """
    labels = _labels(recipe, run, retry_errors) if recipe.queries.unsafe_judge else None
    curated = curate(recipe.queries, labels, _images(recipe, run))
    counts = {
        "queries": _store(run, "queries", curated.queries(ROWS_PER_PART)),
        "dropped": _store(run, "dropped", curated.dropped(ROWS_PER_PART)),
    }
    found = ", ".join(f"{number} {what}" for what, number in curated.counts().most_common())
    logger.info("curate: %s", found)
    if not counts["queries"]:
        raise InputError(
            f"queries.path {recipe.queries.path}: all {counts['dropped']} rows were dropped, "
            f"see the reasons in {run.at('dropped')}"
        )
    run.write_json(MADE_WITH, _inputs(recipe))
    run.write_json(CURATED, counts)


def take_curated(run: RunDir, of: RunDir) -> None:
    """Fill `queries/` and `dropped/` with those of another run directory of the same recipe; nothing is read
    or labelled again."""
    for name in ("queries", "dropped"):
        _store(run, name, (pa.Table.from_batches([batch]) for batch in of.table(name).batches()))
    run.write_json(CURATED, of.read_json(CURATED))


def warn_of_other_input(recipe: Recipe, run: RunDir) -> None:
    """The queries of a run are those that it was begun with; say so where the input has changed since."""
    if not run.exists(MADE_WITH):
        return
    then, now = run.read_json(MADE_WITH), _inputs(recipe)
    changed = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    changed += sorted(now.keys() - then.keys())
    if changed and now:
        logger.warning(
            "%s changed since the run's queries were curated; it goes on with those that it has. Another "
            "`out` takes the new ones",
            ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
        )


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Sizes and samples of the local files that curation reads; none where they cannot be read now."""
    rules = recipe.queries.rules
    try:
        files = [file for file in query_files(recipe.queries) if file.root is None]
        paths = [file.path for file in files]
        paths += [rules.keywords] if rules.keywords and "://" not in rules.keywords else []
        return {path: content_id(sampled(Path(path).expanduser()), digits=12) for path in paths}
    except (InputError, OSError):
        return {}


def _labels(recipe: Recipe, run: RunDir, retry_errors: bool) -> dict[str, bool]:
    """What the judge says of every query that the rules keep, by query id."""
    from vpo_ray.stream.pipeline import generate

    if not run.exists(UNLABELLED):
        everything = recipe.queries.model_copy(update={"size": None, "unsafe_share": None})
        found = curate(everything, images=_images(recipe, run))
        run.write_json(UNLABELLED, {"queries": _store(run, "unlabelled", found.queries(ROWS_PER_PART))})
    generate(recipe, run, Models("", ""), ("label",), retry_errors)
    rows = run.table("labels").rows(["query_id", "unsafe"])
    return {row["query_id"]: row["unsafe"] for row in rows if row["unsafe"] is not None}


def _images(recipe: Recipe, run: RunDir) -> str | None:
    """Where the images of queries go, if they have any."""
    return None if recipe.queries.image_column is None else images_of(run).folder.uri


def _store(run: RunDir, name: str, parts: Iterable[pa.Table]) -> int:
    """Make a table hold these parts; what an interrupted curation of other input left goes."""
    table, stored = run.table(name), 0
    old = set(table.parts())
    for part in parts:
        old.discard(table.append(part))
        stored += len(part)
    for left in old:
        table.delete(left)
    return stored
