"""What a worker started ends with it, however the worker ends; and a worker ends with its raylet."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from chaos.processes import left

from vpo_ray import lifetime

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard reads /proc")

# Two children, one of a thread that has ended, with a grandchild; none of them heeds SIGTERM.
WORKER = """
import os, signal, subprocess, sys, threading, time
from vpo_ray.lifetime import bind_worker

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
ALONE = DEAF + "print('up', flush=True); time.sleep(600)"
PARENT = DEAF + "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); p.wait()"

bind_worker()
bind_worker()
start = lambda *words: subprocess.Popen([sys.executable, "-c", *words], start_new_session=True)
thread = threading.Thread(target=start, args=(ALONE,))
thread.start()
thread.join()
start(PARENT, ALONE)
time.sleep(600)
"""
LIMIT_S = 30.0


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python programs that import this checkout; whatever is left of them is killed at the end."""
    root = str(Path(__file__).parents[1])
    started: list[subprocess.Popen[str]] = []

    def program(code: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *words]
        environment = {**os.environ, "PYTHONPATH": root}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
            )
        )
        return started[-1]

    yield program
    for process in started:
        process.kill()
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def of_worker(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What a WORKER started, once all of it is there and the guard has had time to see it."""
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    time.sleep(3 * lifetime.LOOK_EVERY_S)
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) == 3
    return found


def test_what_a_killed_worker_started_ends(start: Callable[..., subprocess.Popen[str]]) -> None:
    worker = start(WORKER)
    below = of_worker(worker)
    guard = guards_of(worker.pid)
    assert len(guard) == 1, "calling twice starts one guard"
    assert guard[0].pid not in {process.pid for process in below}, "it is no child that goes with the worker"
    worker.kill()
    worker.wait(LIMIT_S)
    assert left([*below, *guard], LIMIT_S) == []


def test_a_worker_that_hangs_ends_with_its_raylet(start: Callable[..., subprocess.Popen[str]]) -> None:
    raylet = start(
        "import subprocess, sys; open('/proc/self/comm', 'w').write('raylet')\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()",
        WORKER,
    )
    assert raylet.stdout is not None
    for _ in range(2):
        assert raylet.stdout.readline() == "up\n"
    time.sleep(3 * lifetime.LOOK_EVERY_S)
    below = psutil.Process(raylet.pid).children(recursive=True)
    assert len(below) == 4
    raylet.kill()
    raylet.wait(LIMIT_S)
    assert left(below, LIMIT_S) == []


def test_a_kernel_without_lists_of_children_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in lifetime._children(os.getpid())
        monkeypatch.setattr(lifetime.os.path, "exists", lambda _: False)
        assert child.pid in lifetime._children(os.getpid())
    finally:
        child.communicate(b"\n", timeout=LIMIT_S)
    assert lifetime.start_ticks(child.pid) == 0


def guards_of(pid: int) -> list[psutil.Process]:
    born = str(lifetime.start_ticks(pid))
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[-2:] == [str(pid), born] and any(word.endswith("lifetime.py") for word in words):
            found.append(process)
    return found
