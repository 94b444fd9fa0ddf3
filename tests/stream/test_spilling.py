"""An object store that is 90% full, and a stream whose blocks have no room in the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clusters import OPEN, ROOT, head, python
from endpoint_server import EndpointServer, Reply, Request, completion
from test_node_kinds import TINY, verdicts

from vpo_ray.recipe import load
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

STORE = 80 * 2**20  # about the smallest that Ray takes
ROWS, EACH = 32, 2**20

# Somebody else's objects, held until the input ends.
FILLER = """
import sys, numpy, ray
ray.init(log_to_driver=False)
held = [ray.put(numpy.zeros(2**20, numpy.uint8)) for _ in range(int(sys.argv[1]) // 2**20)]
print("full", flush=True)
sys.stdin.read()
"""

STREAM = """
import json, sys
from vpo_ray.loop import phases
from vpo_ray.stream import pipeline
from vpo_ray.cli import console
from vpo_ray.recipe import load
from vpo_ray.storage.run_dir import RunDir

console.log_to_stderr()
recipe = load(sys.argv[1], json.loads(sys.argv[2]))
phases.connect()
pipeline.generate(recipe, RunDir(recipe.out), pipeline.Models("none", "p"), ("judge", "render", "score"))
"""


def test_a_store_at_90_percent_makes_no_deadlock_and_spilling_is_told(
    tiny_sets: list[str],
    tmp_path: Path,
    serve_endpoint: Callable[[Callable[[Request], Reply]], EndpointServer],
) -> None:
    """Three pools at once: an endpoint's judge, the video model and the reward, on the tiny weights."""
    verdict = {"critique": "fine", "missing": [], "added": [], "verdict": "aligned"}
    endpoint = serve_endpoint(lambda _: completion(verdict))
    recipe_sets = [
        *tiny_sets[1::2],
        f"out={tmp_path / 'run'}",
        "judge.backend=openai",
        f"judge.endpoint={{base_url: '{endpoint.url}', api_key_env: null}}",
    ]
    recipe = load(TINY, recipe_sets)
    run = RunDir(recipe.out)
    # No stage looks at this column once a prompt is written: its bytes only travel, as long texts do.
    rows: list[dict[str, Any]] = [
        {**row, "verdict": None, "finish_reason": f"{n} " * (EACH // 3)}
        for n, row in enumerate(verdicts(recipe, ROWS))
    ]
    run.table("candidates").append(rows)
    # Else Ray would spill at 80%, before the stream begins.
    node = {**os.environ, **OPEN, "RAY_object_spilling_threshold": "0.98"}
    store = f"--object-store-memory={STORE}"
    with head(tmp_path / "head.log", store, env=node, cpus=2) as (address, _):
        environment = {**os.environ, **OPEN, "RAY_ADDRESS": address}
        filler = subprocess.Popen(
            [sys.executable, "-c", FILLER, str(int(0.9 * STORE))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            assert filler.stdout is not None
            assert filler.stdout.readline() == "full\n"
            told = python(address, "-c", STREAM, TINY, json.dumps(recipe_sets), timeout=400)
        finally:
            filler.kill()
            filler.wait()
    assert told.returncode == 0, told.stderr[-6000:]
    feedback = list(run.table("feedback").rows(["candidate_id", "score", "error"]))
    assert len(feedback) == ROWS
    assert all(row["score"] is not None for row in feedback), [row["error"] for row in feedback][:3]
    assert "the object store spilled" in told.stderr
