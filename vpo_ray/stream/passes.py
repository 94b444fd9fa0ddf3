"""What a stream and its pools are built from, as values that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpo_ray.engines.chat.images import ShownImages
from vpo_ray.recipe import ChatModel, Engine, Pool, Recipe
from vpo_ray.stages.chains import Chain, Models, chain_of
from vpo_ray.stages.spec import StageSpec, stage
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import Table
from vpo_ray.stream.placement import off_nodes
from vpo_ray.stream.spending import RunAccount


@dataclass(frozen=True)
class Pass:
    """One execution of consecutive stages of a chain.

    Args:
        retry_errors: take rows that failed once more.
        render_ids: the ids that the render stage takes, and no others of those that wait for it; all when
            unset.
        is_first: of the passes over the same rows; a further one takes those that were lost before.
        one_row_blocks: only a row that is alone in its process can be known to have killed it.
        excluded: ids of the nodes that take no replica, as their disks are full.
    """

    recipe: Recipe
    run: RunDir
    models: Models
    stages: tuple[str, ...]
    retry_errors: bool = False
    render_ids: np.ndarray | None = None
    is_first: bool = True
    one_row_blocks: bool = False
    excluded: tuple[str, ...] = ()

    @property
    def chain(self) -> Chain:
        return chain_of(self.stages[0])

    def table(self, name: str) -> Table:
        return self.chain.table(self.run, name)

    @property
    def store(self) -> str:
        """URI of the video store."""
        return self.recipe.render.store or self.run.at("videos")

    def block_rows(self, name: str) -> int:
        return 1 if self.one_row_blocks else stage(name).block_rows(self.recipe)

    def replicas(self, spec: StageSpec) -> Replicas:
        pool, engine = spec.pool(self.recipe), spec.engine(self.recipe)
        labels = off_nodes(pool.labels, self.excluded, 1 if engine is None else engine.pieces)
        return Replicas(
            pool.model_copy(update={"labels": labels}), self.block_rows(spec.name), self.one_row_blocks
        )


@dataclass(frozen=True)
class Replicas:
    """A stage's replicas: how many and where, and how many rows each gets at a time.

    Args:
        one_at_a_time: give a replica one batch at a time, so that one that kills it kills no other.
    """

    pool: Pool
    batch_size: int
    one_at_a_time: bool = False


@dataclass(frozen=True)
class VllmModel:
    """A model for vLLM.

    Args:
        name: a folder, URI or hub id of a model, or of a LoRA adapter, which names its model.
        tokenizer: made once in every replica.
        images: those of queries, where it is shown them.
    """

    name: str
    engine: Engine
    tokenizer: Callable[[], Any]
    revision: str | None = None
    trust_remote_code: bool = False
    images: ShownImages | None = None


@dataclass(frozen=True)
class EndpointModel:
    """A model behind an endpoint.

    Args:
        where: the recipe's key of the endpoint, for messages.
        run: URI of the run directory, which pays from `account`.
        answers: URI of the folder of kept answers.
        images: those of queries, where it is shown them.
    """

    model: ChatModel
    where: str
    run: str
    answers: str
    account: RunAccount
    images: ShownImages | None = None
