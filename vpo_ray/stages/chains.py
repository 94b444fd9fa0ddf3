"""Chains of stages: which queries enter, the row that the first stage gets for them, which tables.

They are: labelling (which raw queries are unsafe, for curation), drafting (SFT data for the
queries of the sft split), evolving (new prompts of a query in one round of its evolution), generation
(candidates, verdicts, videos and scores for those of the dpo split), and for an evaluation rewriting (the
prompts of a policy that is an LLM) and preferring (which of two prompts or videos an LLM prefers). `spec`
says which stages they have; `stream.pipeline` runs any of them as one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.recipe import Recipe, Sample
from vpo_ray.records import Row
from vpo_ray.stages import spec
from vpo_ray.stages.draft import draft_key, draft_row
from vpo_ray.stages.label import label_row
from vpo_ray.stages.sample import candidates
from vpo_ray.stages.spec import ChainName, draft_model
from vpo_ray.storage.run_dir import TABLES, RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.storage.tables import Table

Expand = Callable[[list[Row]], list[Row]]


@dataclass(frozen=True)
class Models:
    """Where the models are found from every node, and who the policy is.

    Args:
        policy: folder or hub id of the policy that is sampled.
        policy_id: its identity in candidate ids: a function of the recipe, not of weights' bits.
    """

    policy: str
    policy_id: str


@dataclass(frozen=True)
class Chain:
    """Stages in a row, one table each, all of one schema; a stage reads the table before its own.

    Args:
        split: of the queries that enter, None for all.
        expand: makes the function from Query rows to the rows of the first stage.
        rows_of_query: how many of them a query has.
        source: the table that the first stage reads.
    """

    name: ChainName
    split: str | None
    expand: Callable[[Recipe, Models], Expand]
    rows_of_query: Callable[[Recipe], int] = lambda recipe: 1
    source: str = "queries"

    @property
    def stages(self) -> tuple[str, ...]:
        return spec.names(self.name)

    @property
    def key(self) -> str:
        return TABLES[spec.stages(self.name)[0].table][1]

    @property
    def schema(self) -> pa.Schema:
        return TABLES[spec.stages(self.name)[0].table][0]

    def enters(self, stage: str) -> bool:
        return stage == self.stages[0]

    @property
    def queries(self) -> pc.Expression | None:
        return None if self.split is None else pc.field("split") == self.split

    def table(self, run: RunDir, stage: str) -> Table:
        return run.table(spec.stage(stage).table)

    def table_before(self, run: RunDir, stage: str) -> Table:
        """What a stage reads."""
        if self.enters(stage):
            return run.table(self.source)
        return self.table(run, self.stages[self.stages.index(stage) - 1])

    def rows_before(self, recipe: Recipe, run: RunDir, models: Models, stage: str) -> Iterator[Row]:
        """Every row that a stage has to see, finished or not."""
        if not self.enters(stage):
            yield from self.table_before(run, stage).rows()
            return
        expand = self.expand(recipe, models)
        for query in run.table(self.source).rows(where=self.queries):
            yield from expand([query])


def chain_of(stage: str) -> Chain:
    return CHAINS[spec.stage(stage).chain]


def rows_of_stage(run: RunDir, stage: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows that left a stage, from its own table or the nearest later one of its chain that holds any: a
    row there has all that the stages before it gave it."""
    table = table_of_stage(run, stage)
    yield from () if table is None else table.rows(columns)


def table_of_stage(run: RunDir, stage: str) -> Table | None:
    """The table that `rows_of_stage` reads; None where there are no rows."""
    chain = chain_of(stage)
    later = (chain.table(run, name) for name in chain.stages[chain.stages.index(stage) :])
    return next((table for table in later if table.parts()), None)


def _to_candidates(recipe: Recipe, models: Models) -> Expand:
    return partial(
        _candidates,
        settings=recipe.sample,
        policy=models.policy_id,
        seed=recipe.seed,
        profiles=recipe.profiles,
    )


def _candidates(queries: list[Row], settings: Sample, **more: Any) -> list[Row]:
    return [row for query in queries for row in candidates(query, settings, **more)]


def _to_drafts(recipe: Recipe, models: Models) -> Expand:
    assert recipe.draft is not None
    examples = list(sft_rows(recipe.draft.examples, "draft.examples"))
    key = draft_key(recipe.draft, recipe.judge, examples)
    model = draft_model(recipe)[1].model
    return partial(_drafts, key=key, model=model, seed=recipe.seed, profiles=recipe.profiles)


def _drafts(queries: list[Row], **more: Any) -> list[Row]:
    return [draft_row(query, **more) for query in queries]


def _to_labels(recipe: Recipe, models: Models) -> Expand:
    return _labels


def _labels(queries: list[Row]) -> list[Row]:
    return [label_row(query) for query in queries]


def _to_rewrites(recipe: Recipe, models: Models) -> Expand:
    once = recipe.sample.model_copy(update={"k": 1})
    return _to_candidates(recipe.model_copy(update={"sample": once}), models)


def _to_themselves(recipe: Recipe, models: Models) -> Expand:
    return _as_they_are


def _as_they_are(rows: list[Row]) -> list[Row]:
    return rows


CHAINS: dict[ChainName, Chain] = {
    "labelling": Chain("labelling", None, _to_labels, source="unlabelled"),
    "drafting": Chain("drafting", "sft", _to_drafts),
    "evolving": Chain("evolving", None, _to_themselves, source="histories"),
    "generation": Chain("generation", "dpo", _to_candidates, lambda recipe: recipe.sample.k),
    "rewriting": Chain("rewriting", None, _to_rewrites, source="unwritten"),
    "preferring": Chain("preferring", None, _to_themselves, source="matches"),
}
