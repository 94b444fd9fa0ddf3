"""Scenes in which a `vpo` command fills a run directory.

A command that a fault took is run again, as a job is resubmitted; one that fails by itself is run
again too, but has not survived.
"""

import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from chaos.disturb import Disturber
from chaos.faults import Fault
from chaos.nodes import Nodes
from chaos.outcome import Difference
from chaos.scene import LOOK_EVERY_S, ChaosError, Disturbed, Scene, end_of

# For a run with all its faults; an undisturbed one takes a minute or two.
LIMIT_S = 900.0
RESUBMITTED = 3


class Command(Scene):
    def __init__(self, folder: Path, models: Path, cluster: Nodes) -> None:
        super().__init__(folder, models, cluster)
        self.lives: dict[str, float] = {}

    @property
    def reference(self) -> Path:
        """The run directory of the undisturbed run."""
        return self.folder / f"{self.name}-undisturbed"

    def prepare(self) -> None:
        """Make the undisturbed run, if it is not there, and read how long each process lived."""
        facts = self.folder / f"{self.reference.name}.json"
        if not facts.exists():
            self.begin(self.reference)
            disturber = Disturber([], {}, self.cluster)
            began = time.monotonic()
            log = self.folder / f"{self.reference.name}.log"
            if self._drive(self.reference, disturber, log):
                raise ChaosError(f"the undisturbed run failed: {log}")
            told = {"wall_s": time.monotonic() - began, "lives": disturber.seen_lives()}
            facts.write_text(json.dumps(told), "utf-8")
        told = json.loads(facts.read_text("utf-8"))
        self.lives, self.wall_s = {**told["lives"], "driver": told["wall_s"]}, told["wall_s"]

    def disturb(self, faults: Sequence[Fault], name: str) -> Disturbed:
        folder = self.folder / name
        self.begin(folder)
        disturber = Disturber(faults, self.lives, self.cluster, folder)
        began = time.monotonic()
        failures, broken = RESUBMITTED, ""
        try:
            failures = self._drive(folder, disturber, self.folder / f"{name}.log")
        except ChaosError as error:
            broken = str(error)
        wall_s = time.monotonic() - began
        left_behind = disturber.finish()
        differs, wrong = (Difference((), ()), [broken]) if broken else self.compare(folder)
        return Disturbed(disturber.hits, disturber.waiting, differs, failures, left_behind, wrong, wall_s)

    def begin(self, folder: Path) -> None:
        """Make the run directory, with what the run begins with."""
        folder.mkdir()

    @abstractmethod
    def command(self, folder: Path) -> list[str]:
        """The command that a run directory is filled with."""

    @abstractmethod
    def compare(self, folder: Path) -> tuple[Difference, list[str]]:
        """How a run directory differs from the undisturbed one, and what else is wrong with it."""

    def _drive(self, folder: Path, disturber: Disturber, log: Path) -> int:
        """Run the command to its end, again whenever it was killed or failed; how often it failed."""
        deadline = time.monotonic() + LIMIT_S
        failures = 0
        while True:
            disturber.took_driver = False
            driver = self.start(self.command(folder), log)
            try:
                while driver.poll() is None:
                    disturber.look(driver.pid)
                    if time.monotonic() > deadline:
                        raise ChaosError(f"not done within {LIMIT_S:g} s: {log}\n{end_of(log)}")
                    time.sleep(LOOK_EVERY_S)
            finally:
                driver.kill()
                driver.wait(timeout=30)
            if driver.returncode == 0:
                return failures
            if not disturber.took_driver:
                failures += 1
                if failures > RESUBMITTED:
                    raise ChaosError(f"the run failed {failures} times: {log}\n{end_of(log)}")
