"""Previews by a real video model and a real reward: what is stored where, and a run killed among them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vpo_ray.loop.commands import run_stages
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import FEEDBACK, content_id, query_id
from vpo_ray.report.build import build_report
from vpo_ray.stages.preview import MEASURED, preview_run
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore, video_key

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "jobs/recipes/tiny.yaml")
QUERIES, K = 4, 3
DRIVER = """
import sys
from vpo_ray.loop.commands import run_stages
from vpo_ray.recipe import load
run_stages(load(sys.argv[1], ["out=" + sys.argv[2]]), ("render", "score"))
"""


def recipe_for(folder: Path, tiny_models: Path, *more: str) -> Recipe:
    reward = {"kind": "vbench", "dimensions": ["temporal_flickering", "dynamic_degree"]}
    sets = [
        f"out={folder / 'run'}", f"reward={json.dumps(reward)}", f"render.model={tiny_models / 'video'}",
        f"policy.model={tiny_models / 'policy'}", "render.pool.num_cpus=0.1", "reward.pool.num_cpus=0.1",
        f"sample.k={K}", "pair={margin: 0, dominance: none}", "sft=null",
        "render.preview={steps: 2, probe: 1, agreement: 0.01}",
    ]  # fmt: skip
    return load(TINY, [*sets, *more])


def judged_run(recipe: Recipe, count: int = QUERIES) -> RunDir:
    """A run whose prompts are judged."""
    run = open_run(recipe)
    queries = [f"a cat, number {n} 🐈" for n in range(count)]
    run.table("queries").append(
        [{"query_id": query_id(q), "query": q, "source": "t", "split": "dpo"} for q in queries]
    )
    rows = []
    for query in queries:
        for k in range(K):
            row = dict.fromkeys(FEEDBACK.names)
            row |= {"candidate_id": content_id(query, k), "query_id": query_id(query), "query": query, "k": k}
            rows.append(row | {"seed": 1, "prompt": f"{query} — take {k}", "verdict": "aligned"})
    run.table("candidates").append([row | {"verdict": None} for row in rows])
    run.table("verdicts").append(rows)
    return run


def finished(run: RunDir) -> dict[str, tuple[float | None, str | None, str | None]]:
    return {
        row["candidate_id"]: (row["score"], row["skipped"], row["video_key"])
        for row in run.table("feedback").rows()
    }


def test_previews_are_videos_of_their_own(tmp_path: Path, tiny_models: Path, ray_cluster: None) -> None:
    recipe = recipe_for(tmp_path, tiny_models, "render.preview.probe=2")
    run = judged_run(recipe, 2)
    counts = run_stages(recipe, ("render", "score"))
    assert (counts["preview"]["done"], counts["render"]["done"]) == (6, 6), "all are of the probe"
    looks = preview_run(recipe, run)
    store = VideoStore(run.at("videos"))
    rows = {row["candidate_id"]: row for row in run.table("feedback").rows()}
    seen = {row["candidate_id"]: row for row in looks.table("feedback").rows()}
    assert len(rows) == len(seen) == 2 * K
    for name, row in rows.items():
        look = store.info(seen[name]["video_key"])
        assert (look["settings"]["steps"], look["prompt"]) == (2, row["prompt"])
        assert "preview" not in look["settings"]
        if row["video_key"] is not None:
            full = store.info(row["video_key"])
            assert full["settings"]["steps"] == 3
            assert full["seed"] == look["seed"], "the same noise"
            plain = recipe.render.model_copy(update={"preview": None})
            key = video_key(plain, row["prompt"], row["video_seed"], full["model"])
            assert row["video_key"] == key, "the key that it has without previews"
    make_pairs(recipe, run)
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    assert ledger["stages"]["preview"]["probe"]["pairs"] == run.read_json(MEASURED)["pairs"] > 0
    assert ledger["stages"]["preview"]["seconds"] > 0
    assert {kind: found["videos"] for kind, found in ledger["stages"]["pair"]["videos"].items()} == {
        "all": 6,
        "preview": 6,
    }
    scored = {name for name, row in rows.items() if row["score"] is not None}
    pairs = list(run.table("pairs").rows())
    assert pairs
    assert {row[side] for row in pairs for side in ("chosen_id", "rejected_id")} <= scored
    page = run.read(build_report(run, recipe).removeprefix(f"{run.uri}/")).decode()
    assert "in the probe, previews order" in page
    again = run_stages(recipe, ("render", "score"))
    assert sum(count["done"] for count in again.values()) == 0


def test_killed_among_previews_and_among_full_renders(
    tmp_path: Path, tiny_models: Path, ray_cluster: None
) -> None:
    recipe = recipe_for(tmp_path / "whole", tiny_models)
    whole = judged_run(recipe)
    counts = run_stages(recipe, ("render", "score"))
    assert (counts["preview"]["done"], counts["render"]["done"]) == (QUERIES * K, K + (QUERIES - 1) * 2)
    killed = recipe.model_copy(update={"out": str(tmp_path / "killed/run")})
    run = judged_run(killed)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()), "utf-8")
    looks = preview_run(killed, run)
    stops = [(looks.table("feedback"), 1), (run.table("feedback"), 1), (looks.table("renders"), 6)]
    for table, number in stops:
        with open(tmp_path / "log", "ab") as log:
            command = [sys.executable, "-c", DRIVER, str(path), killed.out]
            driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        deadline = time.monotonic() + 300
        while table.count() < number and driver.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")[-3000:]
            time.sleep(0.05)
        assert driver.poll() is None, (tmp_path / "log").read_text("utf-8")[-3000:]
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert len(finished(run)) < QUERIES * K
    run_stages(killed, ("render", "score"))
    assert finished(run) == finished(whole)
    assert finished(preview_run(killed, run)) == finished(preview_run(recipe, whole))
    assert run.read_json(MEASURED) == whole.read_json(MEASURED)
