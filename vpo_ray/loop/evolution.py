"""Evolution of prompts against the rewards: `vpo evolve`, the SFT data of `sft.data: evolved`, `vpo refine`.

Rounds of all queries run as batches, in two run directories of the run's own:

    evolution/asked    histories ─► evolve ─► offspring              what an LLM writes of the best so far
    evolution/scored   candidates ─► judge ─► render ─► score ─► feedback

What a query needs next follows from these tables alone (see `stages.evolution`), so a run that was killed in
any round goes on there. At the end `evolutions` of the run has every prompt with its fate.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow.compute as pc

from vpo_ray.loop.policies import LoopError, may_retry
from vpo_ray.loop.streams import through
from vpo_ray.recipe import EVOLVED, Recipe
from vpo_ray.records import Row
from vpo_ray.stages.evolution import (
    FitnessError,
    candidate_row,
    entries_of,
    finished,
    next_ask,
    waits,
    why_ended,
)
from vpo_ray.stages.spec import evolving_model, names
from vpo_ray.storage.run_dir import EVOLUTION_ASKED, EVOLUTION_SCORED, RunDir
from vpo_ray.storage.sft_data import evolved_rows, write_chat

logger = logging.getLogger(__name__)

_QUERY = ("query_id", "query", "image", "unsafe", "split")
_ASK = ("ask_id", "round", "shown", "written", "error", "error_stage")
_RESULT = (
    "candidate_id", "verdict", "critique", "video_key", "video_uri", "video_seed", "dimensions", "score",
    "more_rewards", "skipped", "error", "error_stage",
)  # fmt: skip


def evolve_prompts(recipe: Recipe, run: RunDir, retry_errors: bool = False) -> int:
    """Fill `evolutions/` with the queries of the sft split, and write SFT data of the targets as chat-format
    Parquet.

    Args:
        retry_errors: take rows that failed once more.

    Returns:
        How many queries have a target.

    Raises:
        LoopError: the recipe has no evolve section, no query is in the sft split, a dimension that it names
            is none of its rewards', or no prompt is fit to be learnt.
        PlacementError, GenerationError: see `pipeline.generate`.
    """
    if recipe.evolve is None:
        raise LoopError("the recipe has no evolve section: add one (docs/evolution.md)")
    evolving = Evolving(recipe, run)
    if not evolving.queries:
        raise LoopError("no query is in the sft split, whose prompts evolve: give queries.splits.sft a share")
    if retry_errors and recipe.sft is not None and recipe.sft.data == EVOLVED:
        retry_errors = may_retry(run, "prompts of the evolution")
    evolving.run_all(retry_errors)
    if targets := write_chat(run, evolved_rows(run)):
        return targets
    if not recipe.evolve.pairs or (recipe.sft is not None and recipe.sft.data == EVOLVED):
        raise LoopError(_nothing_fit(run))
    return 0


def _nothing_fit(run: RunDir) -> str:
    reasons: Counter[str] = Counter()
    for row in run.table("evolutions").rows(["round", "fault", "error_stage"]):
        reasons.update([row["fault"]] if row["fault"] is not None else [])
        reasons.update([f"prompts failed at {row['error_stage']}"] if row["error_stage"] is not None else [])
    listed = "\n  ".join(f"{count:6} {reason}" for reason, count in reasons.most_common())
    return (
        f"no evolved prompt is fit to be learnt:\n  {listed}\n"
        "Lower evolve.thresholds or evolve.margin, or look at evolutions/ for errors"
    )


@dataclass
class Due:
    """What the next batch does: prompts to judge, render and score, and rounds to ask for; and how many
    queries have ended, by why."""

    prompts: list[Row] = field(default_factory=list)
    asks: list[Row] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)


class Evolving:
    """The evolution of a run's queries.

    Attributes:
        queries: Query rows of the sft split, in the order of their ids.
    """

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        assert recipe.evolve is not None
        self.recipe, self.run, self.settings = recipe, run, recipe.evolve
        self.model = evolving_model(recipe)[1].model
        of_split = run.table("queries").rows(_QUERY, pc.field("split") == "sft")
        self.queries = sorted(of_split, key=lambda row: row["query_id"])

    def run_all(self, retry_errors: bool = False) -> None:
        """Go on until no query needs anything more, then fill `evolutions`."""
        while (due := self.due(retry_errors)).prompts or due.asks:
            logger.info(
                "evolve: %d prompts to render, %d queries to ask for new ones, %d at their end",
                *(len(due.prompts), len(due.asks), due.ended.total()),
            )
            if due.asks:
                own = self.recipe.model_copy(update={"out": self.run.at(EVOLUTION_ASKED)})
                through(own, self.run, ("evolve",), due.asks, retry_errors)
            if due.prompts:
                through(self._scoring(), self.run, names("generation")[1:], due.prompts, retry_errors)
            retry_errors = False
        self.run.table("evolutions").replace(self.rows())

    def is_done(self) -> bool:
        """Whether no query needs anything more."""
        due = self.due(retry_errors=False)
        return not due.prompts and not due.asks

    def rows(self) -> Iterator[Row]:
        """The rows of `evolutions`."""
        for entries in self._entries():
            yield from finished(entries, self.settings)

    def _scoring(self) -> Recipe:
        """The recipe of the run directory in which prompts are judged, rendered and scored."""
        recipe = self.recipe
        store = recipe.render.store or self.run.at("videos")
        render = {"store": store, "strategy": "all", "preview": None}
        return recipe.model_copy(
            update={
                "out": self.run.at(EVOLUTION_SCORED),
                "judge": recipe.judge.without_refining(),
                "render": recipe.render.model_copy(update=render),
                "evolve": None,
                "sft": None,
            }
        )

    def due(self, retry_errors: bool) -> Due:
        """What all queries need next."""
        due = Due()
        for entries in self._entries():
            again = [e for e in entries if retry_errors and e["error"] is not None]
            prompts = [e for e in entries if waits(e) or (e in again and e["prompt"] is not None)]
            rounds = {e["round"] for e in again if e["prompt"] is None}
            due.prompts += map(candidate_row, prompts)
            due.asks += [self._ask([e for e in entries if e["round"] < number]) for number in sorted(rounds)]
            if prompts or rounds:
                continue
            ended = why_ended(entries, self.settings)
            if ended is None:
                due.asks.append(self._ask(entries))
            else:
                due.ended[ended] += 1
        return due

    def _ask(self, entries: list[Row]) -> Row:
        return next_ask(entries, self.settings, self.model, self.recipe.seed)

    def _entries(self) -> Iterator[list[Row]]:
        """The entries of every query as they are now.

        Raises:
            LoopError: a dimension that the recipe names is none of its rewards'.
        """
        asked = RunDir(self.run.at(EVOLUTION_ASKED)).table("offspring").groups("query_id", _ASK)
        scored = RunDir(self.run.at(EVOLUTION_SCORED)).table("feedback").groups("query_id", _RESULT)
        keys = [query["query_id"] for query in self.queries]
        for query, asks, results in zip(
            self.queries, _beside(keys, asked), _beside(keys, scored), strict=True
        ):
            found = {row["candidate_id"]: row for row in results}
            try:
                yield entries_of(query, asks, found, self.settings)
            except FitnessError as error:
                raise LoopError(f"evolve.fitness, evolve.thresholds: {error}") from None


def _beside(keys: Iterable[str], groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The group of rows of each key, empty where there is none. Both are in the order of keys."""
    group = next(groups, None)
    for key in keys:
        while group is not None and group[0]["query_id"] < key:
            group = next(groups, None)
        yield group if group is not None and group[0]["query_id"] == key else []
