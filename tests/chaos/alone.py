"""The scene of a command that starts a Ray cluster for itself, as on a workstation: one signal ends the
driver, the raylet or the whole process group, and with it everything that the command had started.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from chaos import processes
from chaos.disturb import LAST, Hit
from chaos.faults import Fault
from chaos.generation import Generation
from chaos.outcome import Difference
from chaos.scene import ROOT, ChaosError, Disturbed, end_of

# Ray's own workers wait this long, and a little more, for a GCS that is gone.
GONE_S = 90.0
LIMIT_S = 600.0


class Alone(Generation):
    """The same generation; each fault ends the command, which is run again until it is done."""

    name = "alone"
    nodes = {}  # noqa: RUF012
    wall_s = 90.0

    def prepare(self) -> None:
        if not self.reference.exists():
            began = time.monotonic()
            driver = self._launch(self.reference)
            if self._wait(driver, LIMIT_S) != 0:
                raise ChaosError(f"the undisturbed run failed\n{end_of(self._log(self.reference))}")
            self.wall_s = time.monotonic() - began

    def sets(self) -> dict[str, object]:
        pools = ("sample.pool", "judge.pool", "render.pool", "reward.pool")
        return {**super().sets(), **dict.fromkeys(pools, "{num_cpus: 0.3}")}

    def disturb(self, faults: Sequence[Fault], name: str) -> Disturbed:
        folder, began = self.folder / name, time.monotonic()
        hits: list[Hit] = []
        left: list[Fault] = []
        left_behind: list[str] = []
        wrong: list[str] = []
        folder.mkdir()
        for fault in faults:
            driver = self._launch(folder)
            if self._wait(driver, LAST * self.wall_s * fault.after) is not None:
                left.append(fault)  # it was done before
                continue
            struck = time.monotonic()
            try:
                family = self._strike(fault, driver, folder, wrong)
            except (psutil.NoSuchProcess, StopIteration):
                left.append(fault)
                self._end(driver)
                continue
            left_behind += self._left(driver, family)
            hits.append(Hit(fault, struck, frozenset(), lost_s=time.monotonic() - struck))
        driver = self._launch(folder)
        status = self._wait(driver, LIMIT_S)
        differs = Difference((), ())
        if status == 0:
            differs, found = self.compare(folder)
            wrong += found
        else:
            self._end(driver)
            wrong += [f"the last run ended with {status}\n{end_of(self._log(folder))}"]
        return Disturbed(hits, left, differs, 0, left_behind, wrong, time.monotonic() - began)

    def _strike(
        self, fault: Fault, driver: subprocess.Popen[bytes], folder: Path, wrong: list[str]
    ) -> list[psutil.Process]:
        """Bring the fault about, which ends the driver; it and all that was below it."""
        return processes.end(fault.kind.process, driver.pid)

    def _launch(self, folder: Path) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_ADDRESS": "local"}
        with open(self._log(folder), "ab") as output:
            return subprocess.Popen(
                self.command(folder),
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=told,
                start_new_session=True,
            )

    def _log(self, folder: Path) -> Path:
        return self.folder / f"{folder.name}.log"

    @staticmethod
    def _wait(driver: subprocess.Popen[bytes], seconds: float) -> int | None:
        """The status of a command that ends in time."""
        try:
            return driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @staticmethod
    def _left(driver: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> list[str]:
        """What of a driver and all that it had started is there after the time that it has to end."""
        deadline = time.monotonic() + GONE_S
        while driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return processes.left(family, deadline - time.monotonic())

    @staticmethod
    def _end(driver: subprocess.Popen[bytes]) -> None:
        if driver.poll() is not None:
            return
        family = processes.kill(driver.pid)
        driver.wait(30)
        processes.left(family, 5)
