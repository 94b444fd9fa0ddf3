"""A phase of training: what the loop asks for, what the driver hands to a worker, a worker's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vpo_ray.files.folder import Folder, join
from vpo_ray.recipe import Dpo, Limits, Rl, Training
from vpo_ray.records import Row
from vpo_ray.train.examples import Example, Phase

if TYPE_CHECKING:  # the driver needs no torch for a phase that is done
    import numpy as np
    import torch

    from vpo_ray.train.images import JobImages
    from vpo_ray.train.track import Trackers


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """What to train, from which policy, and where the result goes.

    phase: `sft`, `dpo` or `rl`. settings: the recipe's section of the phase.
    model: folder, URI or hub id of the policy to start from.
    reference: the policy that DPO's and RL's is compared with; `model` when None.
    sampler: the policy that RL's candidates come from; `model` when None.
    task_prompt: text with a `{query}` slot, folded into the checkpoint's chat template.
    chat_template_kwargs: arguments of the chat template, which are saved with the checkpoint too.
    out: where the trained policy goes, a folder or URI that all workers reach.
    run_uri: the run directory, for `metrics/<phase>.jsonl` and checkpoints.
    run_name: what trackers call the run, followed by the phase.
    seed: of the order of the data.
    fingerprint: of the recipe; written to the model card and `vpo.json`.
    profiles: the recipe's, dumped, under which queries were asked; written to `vpo.json`.
    images: URI of the images of queries, where the policy is shown them; `image_arguments` of the processor
        that they are sampled with.
    """

    phase: Phase
    settings: Training
    model: str
    task_prompt: str
    out: str
    run_uri: str
    seed: int
    fingerprint: str
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    reference: str | None = None
    sampler: str | None = None
    run_name: str = "vpo_ray"
    profiles: Mapping[str, Any] = field(default_factory=dict)
    images: str | None = None
    image_arguments: Mapping[str, Any] = field(default_factory=dict)
    placement_timeout_s: float = Limits().placement_timeout_s

    def name_of(self, id: str) -> str:
        """The name of the Ray Train run of a job: the same for every start of it."""
        return f"{self.phase}-{id[:16]}"

    def kept_of(self, id: str) -> Folder:
        """The folder of a job's checkpoints."""
        return Folder(join(self.run_uri, f"checkpoints/{self.name_of(id)}"))


@dataclass(frozen=True, kw_only=True)
class Job(PhaseSpec):
    """A phase with its data, as a worker gets it.

    id: of everything that determines the result. end: token ids that end a response.
    facts: what `vpo.json` says of the data. held_out: examples that are evaluated, never trained on.
    shown: the images of prompts, where any has one.
    """

    id: str
    examples: list[Example]
    tokenizer: Any
    end: list[int]
    facts: Row
    held_out: list[Example] = field(default_factory=list)
    shown: JobImages | None = None

    @property
    def steps(self) -> int:
        return total_steps(len(self.examples), self.settings.global_batch, self.settings.epochs)

    @property
    def dpo(self) -> Dpo:
        """The settings of a DPO phase."""
        assert isinstance(self.settings, Dpo)
        return self.settings

    @property
    def rl(self) -> Rl:
        """The settings of an RL phase."""
        assert isinstance(self.settings, Rl)
        return self.settings

    @property
    def name(self) -> str:
        return self.name_of(self.id)

    @property
    def kept(self) -> Folder:
        return self.kept_of(self.id)

    @cached_property
    def rows(self) -> list[Example]:
        """Training examples, then held-out ones; row numbers everywhere index this list."""
        return [*self.examples, *self.held_out]


def total_steps(rows: int, global_batch: int, epochs: float) -> int:
    """Optimizer steps of a phase; an epoch ends with a smaller batch where `rows` is no multiple of it."""
    return max(1, math.ceil(epochs * math.ceil(rows / global_batch) - 1e-9))


@dataclass
class RankState:
    """State of one rank: the engine, and the curve so far (rank 0's is stored)."""

    job: Job
    engine: Any
    rank: int
    workers: int
    device: torch.device
    # Log-probabilities under the reference: for DPO of each response, [rows, 2]; for RL of each token of all
    # rows, [tokens], and in `sampled` under the policy that sampled them.
    reference: np.ndarray | None = None
    sampled: np.ndarray | None = None
    curve: list[Row] = field(default_factory=list)
    resumed_after: int | None = None
    trackers: Trackers | None = None
    status: Any = None

    def say(self, doing: str) -> None:
        """Have the driver's status say what is done beside steps."""
        if self.rank == 0 and self.status is not None:
            self.status.tell.remote(doing=doing)
