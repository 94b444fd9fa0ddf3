"""What `ray job submit` takes: each script is one command of `vpo`, with its options and exit status."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.phases import curate_queries, train_what_is_due
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import load
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "jobs/recipes/tiny.yaml")
JOBS = {
    "run": "run",
    "generate": "generate",
    "train": "train",
    "evaluate": "evaluate",
    "serve_deploy": "deploy",
}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a script as `python` does; its exit status."""
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"jobs/{name}.py"), run_name="__main__")
    return int(end.value.code or 0)


def test_every_job_is_here() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(JOBS)


@pytest.mark.parametrize(("name", "command"), JOBS.items())
def test_a_job_is_a_command(
    name: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its help is the command's, and bad input is the status 2 that nobody should try again."""
    assert run(name, monkeypatch, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: vpo {command} ")
    bad = ["--recipe", TINY, "--set", "render.stepz=3", "--out", str(tmp_path / "run")]
    assert run(name, monkeypatch, *bad) == 2
    assert "render.stepz: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipe_may_be_given_in_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys.modules["vpo_ray.cli.main"], "main", lambda argv: seen.append(argv) or 0)
    for given in (["--recipe", "a.yaml"], ["--recipe=a.yaml"], ["a.yaml"]):
        monkeypatch.setattr(sys, "argv", ["job", *given, "--set", "seed=1"])
        assert cli.job("generate") == 0
    assert seen == [["generate", "a.yaml", "--set", "seed=1"]] * 3


def test_training_waits_for_what_it_needs(tmp_path: Path) -> None:
    """Nothing of this touches Ray: it is told before a worker is asked for."""
    queries = tmp_path / "q.txt"
    queries.write_text("a cat\n", "utf-8")
    sets = [f"out={tmp_path / 'run'}", f"queries.path={queries}", "queries.splits={dpo: 1}", "sft=null"]
    neither = load(TINY, [*sets, "dpo=null", f"out={tmp_path / 'other'}"])
    with pytest.raises(LoopError, match="no sft, dpo or rl section"):
        train_what_is_due(neither, open_run(neither))
    recipe = load(TINY, sets)
    run = open_run(recipe)
    curate_queries(recipe, run)
    with pytest.raises(LoopError, match="feedback holds nothing to train on: run `vpo generate` first"):
        train_what_is_due(recipe, run)
    query = next(run.table("queries").rows())
    rows = list(candidates(query, recipe.sample, "p", recipe.seed))
    scored = {"prompt": "x", "verdict": "aligned", "score": 1.0, "video_key": "v"}
    run.table("feedback").append([{**row, **scored} for row in rows[:3]])
    with pytest.raises(LoopError, match=r"generation is not done.*\n.*1 not accounted for"):
        train_what_is_due(recipe, run)


@pytest.mark.slow
@pytest.mark.engine
def test_a_job_that_is_terminated_leaves_its_ledger(tiny_sets: list[str], tmp_path: Path) -> None:
    """SIGTERM while it samples, as `ray job stop` and a spot node's end send it: status 143."""
    queries = tmp_path / "q.txt"
    queries.write_text("\n".join(f"a cat, number {n}" for n in range(200)), "utf-8")
    out = tmp_path / "run"
    sets = [f"queries.path={queries}", "queries.splits={dpo: 1}", "sft=null", "sample.engine.batch_size=4"]
    options = [part for item in sets for part in ("--set", item)]
    job = subprocess.Popen(
        [sys.executable, "jobs/generate.py", "--recipe", TINY, "--out", str(out), *tiny_sets, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 240
        while not RunDir(out).table("candidates").parts() and job.poll() is None:
            assert time.monotonic() < deadline, "nothing was sampled in time"
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 143, err
    assert "the same command goes on where this stopped" in err
    stages = RunDir(out).read_json("ledger.json")["stages"]
    assert stages["curate"]["out"] == 200, "the job curates first"
    assert 0 < stages["sample"]["out"] < stages["sample"]["in"]
