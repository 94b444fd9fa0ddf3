"""A phase of training, as the driver hands it to its workers, and what each of them holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vpo_ray.files.folder import Folder, join
from vpo_ray.recipe import Dpo, Training
from vpo_ray.records import Row
from vpo_ray.train import packing
from vpo_ray.train.examples import Example, Phase
from vpo_ray.train.track import Trackers


@dataclass(frozen=True)
class Job:
    """One phase as the driver hands it to the workers. `held_out` is evaluated and never trained on;
    `reference` is DPO's reference model where it is not `model`."""

    phase: Phase
    settings: Training
    model: str
    revision: str | None
    trust_remote_code: bool
    examples: list[Example]
    tokenizer: Any
    end: list[int]
    out: str
    run_uri: str
    seed: int
    id: str
    facts: Row
    held_out: list[Example] = field(default_factory=list)
    reference: str | None = None
    run_name: str = "vpo_ray"

    @property
    def steps(self) -> int:
        return packing.total_steps(len(self.examples), self.settings.global_batch, self.settings.epochs)

    @property
    def dpo(self) -> Dpo:
        """The settings of a DPO phase."""
        assert isinstance(self.settings, Dpo)
        return self.settings

    @property
    def name(self) -> str:
        """Of the run of Ray Train: the same for every start of this job."""
        return f"{self.phase}-{self.id[:16]}"

    @property
    def kept(self) -> Folder:
        """The folder of its checkpoints."""
        return Folder(join(self.run_uri, f"checkpoints/{self.name}"))

    @cached_property
    def rows(self) -> list[Example]:
        """Trained rows, then held-out ones; row numbers everywhere are places in this list."""
        return [*self.examples, *self.held_out]


@dataclass
class RankState:
    """State of one rank: the engine, and the curve so far (rank 0's is the one that is stored)."""

    job: Job
    engine: Any
    rank: int
    workers: int
    device: torch.device
    reference: np.ndarray | None = None
    curve: list[Row] = field(default_factory=list)
    resumed_after: int | None = None
    trackers: Trackers | None = None
