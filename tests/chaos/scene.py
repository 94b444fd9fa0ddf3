"""A scene: what is run, undisturbed and then again and again with faults, and how the two are compared."""

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from chaos.disturb import Hit
from chaos.faults import Fault
from chaos.nodes import Nodes
from chaos.outcome import Difference

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs/recipes/tiny.yaml"
LOOK_EVERY_S = 0.25


class ChaosError(RuntimeError):
    """A run that did not end well even undisturbed, or after being run again; with the end of its log."""


@dataclass(frozen=True)
class Disturbed:
    """A run with faults.

    hits: those that happened. left: those whose process was not there long enough. failures: how
    often the command ended by itself before it was done. left_behind: processes that outlived what
    had started them. wrong: what else is not as it should be.
    """

    hits: Sequence[Hit]
    left: Sequence[Fault]
    difference: Difference
    failures: int
    left_behind: Sequence[str]
    wrong: Sequence[str]
    wall_s: float

    @property
    def survived(self) -> bool:
        whole = not self.difference.lost and not self.difference.duplicated
        return whole and not self.failures and not self.wrong and not self.left_behind


class Scene(ABC):
    """
    Args:
        folder: where all runs go; an undisturbed run that is there already is taken.
        models: the tiny checkpoints.
        cluster: with the nodes that the scene says.
    """

    # One kind of node for the LLMs, one for the video and the reward model; either has room to train.
    nodes: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "llm": {"llm": 2, "train": 1},
        "video": {"video": 2, "train": 1},
    }
    head_cpus: ClassVar[int] = 0
    environment: ClassVar[Mapping[str, str]] = {}
    name: ClassVar[str]
    # Seconds of an undisturbed run, of which a scene may not know.
    wall_s = 0.0

    def __init__(self, folder: Path, models: Path, cluster: Nodes) -> None:
        self.folder, self.models, self.cluster = folder, models, cluster

    @abstractmethod
    def prepare(self) -> None:
        """What is made once: the undisturbed run, if it is not there."""

    @abstractmethod
    def disturb(self, faults: Sequence[Fault], name: str) -> Disturbed:
        """Make a run with faults, and compare it with the undisturbed one."""

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A driver on the scene's cluster. It and its workers import this checkout."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {"RAY_ADDRESS": self.cluster.address, "PYTHONPATH": os.pathsep.join(paths)}
        with open(log, "ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, **self.environment, **told},
            )

    def vpo(self, name: str, sets: Mapping[str, object], *more: str) -> list[str]:
        """A `vpo` command on the tiny recipe with the tiny checkpoints."""
        models = {
            "policy.model": self.models / "policy",
            "judge.model": self.models / "judge",
            "render.model": self.models / "video",
            "reward.model": self.models / "reward",
            "reward.checklist.file": self.models / "reward/checklist.yaml",
        }
        given = [part for key, value in {**models, **sets}.items() for part in ("--set", f"{key}={value}")]
        return [sys.executable, "-m", "vpo_ray.cli", name, *more, *given]


def end_of(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-4000:]
