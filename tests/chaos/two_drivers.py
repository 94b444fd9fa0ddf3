"""The scene of two drivers on one run directory: a second one is refused while the first works, and
takes over where the first is frozen, which stops when it thaws.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil

from chaos import processes
from chaos.alone import GONE_S, Alone
from chaos.faults import Fault
from chaos.scene import end_of
from vpo_ray.storage.run_lock import FOLDER, STALE_S, RunInUseError

# A second driver imports and connects before it asks for the directory.
START_S = 120.0


class TwoDrivers(Alone):
    """The same generation. Both drivers are gone after each fault, and the command is run again."""

    name = "two-drivers"

    def _strike(
        self, fault: Fault, driver: subprocess.Popen[bytes], folder: Path, wrong: list[str]
    ) -> list[psutil.Process]:
        family = [psutil.Process(driver.pid), *processes.below(driver.pid)]
        if fault.kind.process == "frozen driver":
            driver.send_signal(signal.SIGSTOP)
        second = self._launch(folder)
        try:
            if fault.kind.process == "frozen driver":
                if not self._takes_over(folder, second):
                    wrong.append(f"a frozen driver was not taken over: {end_of(self._log(folder))}")
                driver.send_signal(signal.SIGCONT)
                if self._wait(driver, GONE_S) in (None, 0):
                    wrong.append("a driver that was frozen went on after it had lost its run directory")
            else:
                status = self._wait(second, START_S + STALE_S)
                if status != RunInUseError.exit_status and driver.poll() is None:
                    wrong.append(f"a second driver was not refused: status {status}")
        finally:
            for process in (driver, second):
                if process.poll() is None:
                    self._end(process)
        return family

    def _takes_over(self, folder: Path, second: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_S + STALE_S
        while second.poll() is None and time.monotonic() < deadline:
            for claim in (folder / FOLDER).glob("*.json"):
                try:
                    told = json.loads(claim.read_text("utf-8"))
                except (FileNotFoundError, ValueError):
                    continue  # it is being written, or was taken back
                if told["pid"] == second.pid and told["state"] == "held":
                    return True
            time.sleep(0.2)
        return False
