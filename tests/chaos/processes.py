"""The processes of a run under test, found by walking down from its raylets and killed by id.

Whatever is found was started by this test: drivers and raylets are its children, workers are the
raylets' children, and an engine's core is a child of its actor.
"""

import os
import re
import signal
import time
from collections.abc import Iterable

import psutil

# The title of each kind of process. Ray appends the method that an actor is in.
TITLES = {
    "sampler": r"ray::MapWorker\(MapBatches\(sample\)",
    "judge": r"ray::MapWorker\(MapBatches\(judge\)",
    "engine core": r"VLLM::EngineCore",
    "renderer": r"ray::MapWorker\(MapBatches\(render\)",
    "scorer": r"ray::MapWorker\(MapBatches\(score\)",
    "training rank": r"ray::RayTrainWorker",
    "Serve replica": r"ray::ServeReplica:vpo:PolicyServer",
}


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended meanwhile


def below(pid: int) -> list[psutil.Process]:
    """All that a process started, and what these started; none when it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def find(kind: str, among: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes of a kind, oldest first."""
    return sorted(
        (process for process in among if re.match(TITLES[kind], title(process))),
        key=lambda p: (born(p), p.pid),
    )


def born(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0


def kill(pid: int) -> list[psutil.Process]:
    """SIGKILL one process; what it had started, which should end by itself."""
    children = below(pid)
    psutil.Process(pid).send_signal(signal.SIGKILL)
    return children


def end(kind: str, driver: int) -> list[psutil.Process]:
    """End a driver, its whole process group, or the raylet that it started; the driver and all that was
    below it, which should end by itself."""
    family = [psutil.Process(driver), *below(driver)]
    if kind == "group":
        os.killpg(driver, signal.SIGTERM)
    elif kind == "driver":
        family[0].kill()
    else:
        next(process for process in family if re.search(r"/raylet/raylet\b", title(process))).kill()
    return family


def left(processes: Iterable[psutil.Process], patience_s: float) -> list[str]:
    """Titles of those processes that have not ended by themselves in time; they are killed now."""
    deadline = time.monotonic() + patience_s
    alive = [process for process in processes if _runs(process)]
    while alive and time.monotonic() < deadline:
        time.sleep(0.2)
        alive = [process for process in alive if _runs(process)]
    names = [title(process)[:60] for process in alive]
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return names


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
