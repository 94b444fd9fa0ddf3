"""Chains of stages: which queries enter, the row that the first stage gets for them, which tables.

There are three: labelling (which raw queries are unsafe, for curation), drafting (SFT data for the
queries of the sft split), and generation (candidates, verdicts, videos and scores for those of the
dpo split). `pipeline` runs any of them as one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from vpo_ray.recipe import ChatModel, Recipe, Sample
from vpo_ray.records import DRAFT, FEEDBACK, LABEL, Row
from vpo_ray.stages.draft import draft_key, draft_row
from vpo_ray.stages.label import label_row
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir
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
    """Stages in a row, one table each.

    Args:
        stages: name and table; a stage reads the table before its own, the first one `source`.
        split: of the queries that enter, None for all.
        expand: makes the function from Query rows to the rows of the first stage.
        schema, key: of all its tables.
    """

    stages: Mapping[str, str]
    split: str | None
    expand: Callable[[Recipe, Models], Expand]
    schema: pa.Schema
    key: str
    source: str = "queries"

    def enters(self, stage: str) -> bool:
        return stage == next(iter(self.stages))

    @property
    def queries(self) -> pc.Expression | None:
        return None if self.split is None else pc.field("split") == self.split

    def table(self, run: RunDir, stage: str) -> Table:
        return run.table(self.stages[stage])

    def table_before(self, run: RunDir, stage: str) -> Table:
        """What a stage reads; not for the first."""
        names = list(self.stages)
        return self.table(run, names[names.index(stage) - 1])

    def rows_before(self, recipe: Recipe, run: RunDir, models: Models, stage: str) -> Iterator[Row]:
        """Every row that a stage has to see, finished or not."""
        if not self.enters(stage):
            yield from self.table_before(run, stage).rows()
            return
        expand = self.expand(recipe, models)
        for query in run.table(self.source).rows(where=self.queries):
            yield from expand([query])


def draft_model(recipe: Recipe) -> tuple[str, ChatModel]:
    """The recipe's key of the LLM that drafts, and its settings."""
    if recipe.draft is not None and recipe.draft.llm is not None:
        return "draft.llm", recipe.draft.llm
    return "judge", recipe.judge


def _to_candidates(recipe: Recipe, models: Models) -> Expand:
    return partial(_candidates, settings=recipe.sample, policy=models.policy_id, seed=recipe.seed)


def _candidates(queries: list[Row], settings: Sample, policy: str, seed: int) -> list[Row]:
    return [row for query in queries for row in candidates(query, settings, policy, seed)]


def _to_drafts(recipe: Recipe, models: Models) -> Expand:
    assert recipe.draft is not None
    examples = list(sft_rows(recipe.draft.examples, "draft.examples"))
    key = draft_key(recipe.draft, recipe.judge, examples)
    return partial(_drafts, key=key, model=draft_model(recipe)[1].model, seed=recipe.seed)


def _drafts(queries: list[Row], key: str, model: str, seed: int) -> list[Row]:
    return [draft_row(query, key, model, seed) for query in queries]


def _to_labels(recipe: Recipe, models: Models) -> Expand:
    return _labels


def _labels(queries: list[Row]) -> list[Row]:
    return [label_row(query) for query in queries]


GENERATION = Chain(
    {"sample": "candidates", "judge": "verdicts", "render": "renders", "score": "feedback"},
    "dpo",
    _to_candidates,
    FEEDBACK,
    "candidate_id",
)
DRAFTING = Chain({"draft": "drafts"}, "sft", _to_drafts, DRAFT, "draft_id")
LABELLING = Chain({"label": "labels"}, None, _to_labels, LABEL, "query_id", source="unlabelled")
CHAIN_OF = {stage: chain for chain in (GENERATION, DRAFTING, LABELLING) for stage in chain.stages}
