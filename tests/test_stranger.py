"""What somebody does who has only the wheel and an empty folder: a recipe, a plan, a run, an answer."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from clusters import free_port

ROOT = Path(__file__).parents[1]
NOT_TRACKED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
# A few rows of everything: what is learnt is not looked at here.
FEW = [
    "queries.limit=6",
    "sft.epochs=1",
    "sample.k=2",
    "evaluate.sets.held_out.size=3",
    "pair.video_per_query=1",
]

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stranger")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The wheel, installed beside the engines and away from the clone."""
    made = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, made / "source", ignore=NOT_TRACKED)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", made / "dist", made / "source"], check=True
    )
    (wheel,) = (made / "dist").glob("vpo_ray-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", made / "site", wheel], check=True
    )
    shutil.rmtree(made / "source")
    return {**os.environ, "PYTHONPATH": str(made / "site")}


@pytest.fixture
def vpo(folder: Path, environment: dict[str, str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "vpo_ray.cli", *words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_stranger_gets_an_answer(vpo, folder: Path, environment: dict[str, str]) -> None:
    vpo("world", "runs/world")
    assert "recipe.yaml" in vpo("init", "--example", "laptop")
    few = [word for setting in FEW for word in ("--set", setting)]
    assert "wall time" in vpo("plan", "recipe.yaml", *few)
    assert "6 queries → 12 candidates" in vpo("run", "recipe.yaml", *few)
    assert "runs/laptop: done" in vpo("status", "--out", "runs/laptop")
    assert "3 queries" in vpo("evaluate", "recipe.yaml", *few)
    listed = vpo("runs", "runs")
    assert "6 → 12" in listed
    assert (folder / "runs/laptop/report/index.html").exists()
    assert left_behind(folder) == []
    port = free_port()
    command = [sys.executable, "-P", "-m", "vpo_ray.cli", "serve", "runs/laptop/checkpoints/dpo"]
    command += ["--recipe", "runs/laptop/recipe.yaml", "--set", f"serve.port={port}"]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        assert answer(server, port, folder / "serve.log")
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) in (0, 143)


def left_behind(folder: Path) -> list[str]:
    """What a run left outside its directory, beside what the stranger asked for."""
    return sorted(path.name for path in folder.iterdir() if path.name not in {"runs", "recipe.yaml"})


def answer(server: subprocess.Popen[bytes], port: int, log: Path) -> str:
    """What the endpoint makes of a query, once it is up."""
    end = time.monotonic() + 300
    while True:
        assert server.poll() is None, log.read_text("utf-8")
        assert time.monotonic() < end, log.read_text("utf-8")
        try:
            reply = httpx.post(
                f"http://127.0.0.1:{port}/v1/optimize",
                json={"query": "red bal", "temperature": 0},
                timeout=60,
            )
        except httpx.TransportError:
            time.sleep(1)
            continue
        if reply.status_code == 200:
            found: str = reply.json()["prompt"]
            return found
        time.sleep(1)
