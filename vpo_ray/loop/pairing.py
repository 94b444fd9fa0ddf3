"""Pairing as a step of a run: `feedback/` into `pairs/`, and why the other queries have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from vpo_ray.files.folder import parent_of
from vpo_ray.files.image_files import ImageError, is_image_name
from vpo_ray.loop.evolved import evolved_candidates
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import Recipe
from vpo_ray.records import PAIR, Row
from vpo_ray.stages.adaptive import videos_by_strategy
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.preview import videos_by_previews
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import PAIRED, ROUND, RunDir
from vpo_ray.storage.tables import Table

COLUMNS = (
    "candidate_id", "query_id", "query", "image", "k", "prompt", "verdict", "refined_prompt", "refined_fault",
    "refined_verdict", "answers", "dimensions", "score", "more_rewards", "error", "error_stage", "profile",
    "conditions", "unmet",
)  # fmt: skip
_READERS = 8  # images read at once; an object store takes tens of ms for each


def make_pairs(recipe: Recipe, run: RunDir) -> int:
    """Fill `pairs/` from `feedback/`, replacing what is there; count what either strategy renders.

    Raises:
        LoopError: no pair was found, and nothing was replaced; the message counts the reasons.
    """
    reasons: Counter[str] = Counter()
    videos: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    found = _pairs(recipe, run, reasons, videos, seen)
    first = next(found, None)
    count = 0 if first is None else run.table("pairs").replace(chain([first], found))
    run.write_json(PAIRED, {"reasons": dict(reasons), "videos": dict(videos)})
    if not count:
        by_formula = recipe.pair.by == "formula"
        loosen = "pair.margin or what the formula asks for" if by_formula else "pair.margin or pair.dominance"
        listed = "\n  ".join(f"{n:6} {reason}" for reason, n in (reasons + seen).most_common())
        raise LoopError(
            "no preference pairs were found, so there is nothing to train on:\n  "
            f"{listed or '  there is no feedback'}\n"
            f"Lower {loosen}, sample more (sample.k), or look at feedback/ for errors"
        )
    return count


def _pairs(
    recipe: Recipe, run: RunDir, reasons: Counter[str], videos: Counter[str], seen: Counter[str]
) -> Iterator[Row]:
    """Pairs by query. Counts why there is none, the videos of each strategy, and the candidates seen."""
    formula = recipe.formula and recipe.formula.at(run.round_number())
    if recipe.pair.also is not None:
        yield from _further(recipe, recipe.pair.also, run)
    for candidates in run.table("feedback").groups("query_id", COLUMNS):
        for name in ("verdict", "error_stage"):
            values = (row[name] for row in candidates if row[name] is not None)
            seen.update(f"candidates with {name} {value}" for value in values)
        if recipe.render.preview is not None:
            videos.update(videos_by_previews(candidates))
        else:
            videos.update(videos_by_strategy(candidates, recipe.pair, formula))
        yield from pairs_of_query(candidates, recipe.pair, reasons, formula)
    if recipe.evolve is not None and recipe.evolve.pairs and not run.exists(ROUND):
        for candidates in evolved_candidates(run, COLUMNS):
            yield from pairs_of_query(candidates, recipe.pair, reasons, formula)


def _further(recipe: Recipe, also: str, run: RunDir) -> Iterator[Row]:
    """The pairs of another folder, once their images, in `images/` beside it or of its run, are in the run's.

    Raises:
        LoopError: there are no pairs, what is there is no such image, or nothing says what the policy is to
            do with it.
        StorageError: an image is not there, or cannot be read.
    """
    theirs, ours = images_of(RunDir(parent_of(also))), images_of(run)
    pairs = Table(also, PAIR, "pair_id")
    if not pairs.parts():
        raise LoopError(f"pair.also: {also} holds no pairs: name the folder `pairs` that `vpo collect` made")
    names = {name for batch in pairs.batches(["image"]) for name in batch.column(0).to_pylist()} - {None}
    if names and recipe.queries.image_column is None and recipe.policy.images == "show":
        raise LoopError(
            f"pair.also: {also} has pairs of queries with an image, and the recipe's queries have none: name "
            "queries.image_column, or write policy.images: ignore to learn from the words alone"
        )

    def bring(name: str) -> None:
        if not is_image_name(name):
            raise LoopError(f"pair.also: {also} has a pair whose image {name[:100]!r} is no image's name")
        try:
            ours.put(theirs.read(name))
        except ImageError as error:
            raise LoopError(f"pair.also: {theirs.folder.at(name)}: {error}") from error

    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(bring, sorted(names)))
    yield from pairs.rows()
