"""Nothing that a command started outlives it, in each phase of a run and while serving: neither after a
signal to the whole process group (a service manager's, `timeout`'s, a container runtime's) nor after
SIGKILL of the driver, of the raylet or of a replica.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from chaos import processes

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.serve.run import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs/recipes/tiny.yaml"
# Ray's own workers wait a minute for a GCS that is gone.
GONE_S = 90.0
# Of ours, and of what they started.
OURS = ("ray::MapWorker", "ray::RayTrainWorker", "ray::ServeReplica", "VLLM::")


@contextmanager
def running(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `vpo` command with a process group and a Ray cluster of its own; nothing of it stays."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "vpo_ray.cli", *words]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        yield process
    finally:
        family = processes.below(process.pid)
        process.kill()
        process.wait(30)
        processes.left(family, 0)


def when(
    ready: Callable[[], object], process: subprocess.Popen[bytes], log: Path, limit_s: float = 400.0
) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert process.poll() is None, log.read_text("utf-8", "replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text("utf-8", "replace")[-4000:]
        time.sleep(0.2)


def ours_of(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    ours = [each for each in family if processes.title(each).startswith(OURS)]
    assert ours
    return ours


def left(process: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> list[str]:
    """What of a command and of all that it had started does not end by itself."""
    assert processes.left(ours_of(family), 30.0) == []
    deadline = time.monotonic() + GONE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return processes.left(family, deadline - time.monotonic())


def test_no_phase_of_a_run_leaves_a_process(tiny_sets: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["run", str(RECIPE), "--out", str(tmp_path / "run"), *tiny_sets]
    # One run, ended in phase after phase, each time with another signal.
    for kind, struck in (("training rank", "group"), ("engine core", "raylet"), ("renderer", "driver")):
        with running(log, *command) as driver:
            when(lambda kind=kind, d=driver: processes.find(kind, processes.below(d.pid)), driver, log)
            time.sleep(2)
            assert left(driver, processes.end(struck, driver.pid)) == [], (kind, struck)


@pytest.fixture(scope="module")
def checkpoint(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "policy"
    shutil.copytree(tiny_models / "policy", folder)
    load_tokenizer(str(folder), read_prompt("builtin:policy")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("struck", ["group", "driver", "raylet", "replica"])
def test_an_engine_does_not_outlive_what_it_serves(struck: str, checkpoint: Path, tmp_path: Path) -> None:
    port, log = free_port("127.0.0.1"), tmp_path / "log"
    body = {"model": "vpo", "messages": [{"role": "user", "content": "cat"}], "max_tokens": 4}

    def answers() -> bool:
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            return httpx.post(url, json=body, timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    words = ["serve", str(checkpoint), "--recipe", str(RECIPE), "--set", f"serve.port={port}"]
    with running(log, *words) as server:
        when(answers, server, log)
        if struck == "replica":
            replica = processes.find("Serve replica", processes.below(server.pid))[0]
            below = processes.below(replica.pid)
            assert processes.find("engine core", below)
            replica.send_signal(signal.SIGKILL)
            assert processes.left(below, 30.0) == []
            return
        family = processes.end(struck, server.pid)
        if struck == "raylet":
            # The command itself had no part in that: it is there until it is told to stop.
            assert processes.left(ours_of(family), 30.0) == []
            return
        assert left(server, family) == []
        if struck == "group":
            assert server.returncode == 0, log.read_text("utf-8", "replace")[-4000:]
