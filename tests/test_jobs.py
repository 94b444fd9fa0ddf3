"""The whole loop through Ray's job API on an object store, as `vpo submit` submits it: SFT, feedback, DPO,
an answer."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import bucket

from vpo_ray.loop.ledger import reconcile
from vpo_ray.storage.cache_folder import VARIABLE
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run directory in a bucket, and a cache of its own for what is fetched from there."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    with bucket("runs") as options:
        yield f"s3://runs/one?{options}"


@pytest.fixture
def head(tmp_path: Path, out: str) -> Iterator[dict[str, str]]:
    """A head node of its own: ports, folder, processes, token. Yields the environment of its users."""
    # Jobs are run by the `python` of the node, which here is the one of these tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    user = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="j", dir="/tmp")
    dashboard = free_port()
    ray = Path(sys.executable).parent / "ray"
    arguments = [
        ray,
        "start",
        "--head",
        "--block",
        "--num-cpus=3",
        f"--port={free_port()}",
        f"--temp-dir={folder}",
    ]
    arguments += ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    arguments += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--object-store-memory=400000000",
    ]
    with open(tmp_path / "head.log", "wb") as log:
        # Its own process group, so that exactly its processes can be stopped.
        node = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True, env=user)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert node.poll() is None, (tmp_path / "head.log").read_text("utf-8")
            assert time.monotonic() < deadline, "the head node did not start in time"
            time.sleep(0.5)
        yield {**user, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        # What the jobs wrote is checked; nothing of this node is worth a graceful end of 30 s.
        os.killpg(node.pid, signal.SIGKILL)
        node.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def snapshot(run: RunDir) -> dict[str, int]:
    """When each video and checkpoint file was written."""
    names = [name for name in run.files() if name.startswith(("videos/", "checkpoints/"))]
    return {name: run.fs.get_file_info(f"{run.path}/{name}").mtime_ns for name in names}


def began(run: RunDir) -> bool:
    return run.exists("recipe.yaml")


def test_a_submitted_job_runs_the_loop_and_again_finds_it_done(
    head: dict[str, str], out: str, tiny_sets: list[str], tmp_path: Path
) -> None:
    queries = tmp_path / "queries.txt"
    animals = ["cat", "dog", "owl", "fox", "hen", "eel"]
    queries.write_text("\n".join(f"a {animal} in the rain" for animal in animals), "utf-8")
    run = RunDir(out)
    entry = [sys.executable, "jobs/run.py", "--recipe", "jobs/recipes/tiny.yaml", "--out", out]
    entry += [*tiny_sets, "--set", f"queries.path={queries}", "--set", "queries.splits={dpo: 1}"]
    # Two workers are tested where training is; here each would import everything once more.
    entry += [
        "--set",
        "sft.data=vpo_ray/data/sft.jsonl",
        "--set",
        "sft.epochs=2",
        "--set",
        "sft.workers=1",
        "--set",
        "dpo.workers=1",
    ]
    # Only what the job needs travels; the package is installed where the nodes run.
    work = tmp_path / "work"
    shutil.copytree(ROOT / "jobs", work / "jobs")
    shutil.copytree(ROOT / "vpo_ray/data", work / "vpo_ray/data")
    submit = [sys.executable, "-m", "vpo_ray.cli", "submit", str(work / "jobs/recipes/tiny.yaml")]
    submit += ["--working-dir", str(work), "--follow", *entry[4:]]
    with open(tmp_path / "job.log", "w+", encoding="utf-8") as log:
        deadline = time.monotonic() + 240
        while True:
            job = subprocess.Popen(submit, stdout=log, stderr=log, env=head)
            try:
                while not began(run) and job.poll() is None:
                    time.sleep(0.5)
                if began(run):
                    # It runs: the same again is refused, and does not disturb it.
                    again = subprocess.run(submit, capture_output=True, text=True, timeout=120, env=head)
                status = job.wait(timeout=900)
            finally:
                job.kill()
            # The API answers before the node's agent can take a job: a job that began is not tried again.
            if status == 0 or began(run) or time.monotonic() > deadline:
                break
            time.sleep(3)
        log.seek(0)
        assert status == 0, log.read()[-6000:]
    assert again.returncode == 3, again.stderr
    assert "this run is running as vpo-tiny-run-" in again.stderr

    ledger = run.read_json("ledger.json")
    assert reconcile(ledger) == []
    assert run.table("feedback").count() == 24
    assert run.table("pairs").count() > 0
    for phase in ("sft", "dpo"):
        assert run.exists(f"checkpoints/{phase}/vpo.json")
        assert run.metrics(phase)
    example = run.read_json("example.json")
    # Two epochs teach a tiny policy little: what it serves may be no more than the end of a text.
    assert example["query"]
    assert example["sft"]
    assert isinstance(example["dpo"], str)
    assert run.exists("report/index.html")

    before = snapshot(run)
    again = subprocess.run(
        [sys.executable, *entry[1:]], capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ
    )
    assert again.returncode == 0, again.stderr[-4000:]
    assert snapshot(run) == before, "the second run rendered and trained nothing"
