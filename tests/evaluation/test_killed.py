"""An evaluation that is killed goes on, and its results are those of one that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


def command(tiny_sets: list[str], folder: Path, out: Path) -> list[str]:
    queries = folder / "queries.txt"
    queries.write_text("\n".join(f"a cat, number {n}" for n in range(24)), "utf-8")
    evaluation = {
        "policies": ["query", "base"],
        "rewards": {"motion": {"kind": "vbench", "dimensions": ["dynamic_degree"]}},
    }
    values = {
        "queries.path": queries,
        "queries.splits": "{dpo: 0.5, eval: 0.5}",
        "sft": "null",
        "dpo": "null",
        "evaluate": json.dumps(evaluation),
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    recipe = str(ROOT / "jobs/recipes/tiny.yaml")
    return [sys.executable, "-m", "vpo_ray.cli", "evaluate", recipe, "--out", str(out), *tiny_sets, *sets]


def results(out: Path) -> dict[str, Any]:
    latest = json.loads((out / "evaluation.json").read_text("utf-8"))
    found: dict[str, Any] = json.loads((out / latest["results"]).read_text("utf-8"))
    return {key: value for key, value in found.items() if key != "date"}


def parts(out: Path, kind: str, table: str) -> int:
    return len(list(out.glob(f"evaluation/{kind}-*/{table}/*.parquet")))


def test_killed_among_verdicts_and_among_videos(tiny_sets: list[str], tmp_path: Path) -> None:
    curate = [
        part if part != "evaluate" else "curate" for part in command(tiny_sets, tmp_path, tmp_path / "a")
    ]
    for name in ("a", "b"):
        subprocess.run(
            [part.replace(f"{tmp_path}/a", f"{tmp_path}/{name}") for part in curate], check=True, cwd=ROOT
        )
    subprocess.run(command(tiny_sets, tmp_path, tmp_path / "a"), check=True, cwd=ROOT, timeout=600)
    out = tmp_path / "b"
    for kind, table in (("judged", "verdicts"), ("videos", "feedback")):
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(
                command(tiny_sets, tmp_path, out), stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while parts(out, kind, table) < 2 and process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tiny_sets, tmp_path, out), check=True, cwd=ROOT, timeout=600)
    undisturbed = json.dumps(results(tmp_path / "a"), sort_keys=True)
    # Where the videos are is the only other thing that differs between two run directories.
    assert json.dumps(results(out), sort_keys=True) == undisturbed
