"""The suite itself, and its short forms: a driver and a renderer killed, and, with more patience, a
renderer, a scorer and the node of both.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chaos import processes
from chaos.disturb import Hit
from chaos.faults import KINDS, NAMES, Fault, draw, share_out
from chaos.generation import Generation
from chaos.nodes import Nodes
from chaos.outcome import Difference, Made, difference, other_videos, stored_twice
from chaos.scene import RECIPE, Disturbed, end_of
from chaos.table import records_of, table
from vpo_ray.engines.video.engine import encode
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.phases import curate_queries
from vpo_ray.loop.policies import policy_id
from vpo_ray.recipe import load
from vpo_ray.stages.chains import CHAINS
from vpo_ray.stages.render import Renderer
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream.pipeline import Models

KILLED = ("renderer", "scorer", "raylet, rendering")
# Half of it loads a model, the other half makes twelve videos.
LIFE_S = 18.0


def test_a_seed_draws_the_same_faults_of_every_kind() -> None:
    faults = draw(7, 64)
    assert faults == draw(7, 64) != draw(8, 64)
    counts = Counter(fault.kind.name for fault in faults)
    assert counts.keys() == set(NAMES)
    assert all(abs(counts[kind.name] - kind.share) <= 1 for kind in KINDS)
    assert {fault.kind.name for fault in draw(7, len(NAMES))} == set(NAMES)
    assert all(0 <= fault.after < 1 for fault in faults)
    only = draw(1, 5, ["judge", "scorer"])
    assert len(only) == 5
    assert {fault.kind.name for fault in only} == {"judge", "scorer"}


def test_a_run_has_faults_of_one_scene() -> None:
    faults = draw(3, 64)
    runs = share_out(faults, 5)
    assert sorted(map(repr, faults)) == sorted(repr(fault) for _, part in runs for fault in part)
    for scene, part in runs:
        assert {fault.kind.scene for fault in part} == {scene}
        assert len(part) <= 5


def test_what_is_absent_other_or_twice_is_found() -> None:
    reference: Made = {"sample": {"a": "1", "b": "2"}, "pair": {"p": "3"}}
    assert difference(reference, {"sample": {"a": "1", "b": "2"}, "pair": {"p": "3"}}) == Difference((), ())
    worse: Made = {"sample": {"a": "1", "b": "9", "c": "4"}, "pair": {}}
    assert difference(reference, worse, ["feedback a"]) == Difference(
        ("sample b", "pair p"), ("sample c", "feedback a")
    )


def test_a_row_that_is_stored_in_two_parts_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [{"candidate_id": c, "query_id": "q", "query": "q", "k": 0, "seed": 1} for c in "ab"]
    run.table("feedback").append(rows)
    assert stored_twice(run) == []
    run.table("feedback").append(rows[:1])
    assert stored_twice(run) == ["feedback a"]


def test_a_video_of_other_frames_is_found_and_rounding_is_not(tmp_path: Path, clip: Any) -> None:
    runs = [RunDir(tmp_path / name) for name in ("reference", "same", "rounded", "other", "none")]
    frames = np.random.default_rng(0).integers(8, 248, (9, 64, 96, 3), dtype=np.uint8)
    same, rounded = encode(frames, 8, 12), encode(frames + (frames % 5 == 0), 8, 12)
    videos = [same, same, rounded, clip(2), None]
    row = {"candidate_id": "c", "query_id": "q", "query": "q", "k": 0, "seed": 1, "video_key": "ab" * 16}
    for run, video in zip(runs, videos, strict=True):
        run.table("feedback").append([row])
        if video is not None:
            VideoStore(run.at("videos")).write(row["video_key"], video, {})
    told = [other_videos(runs[0], run) for run in runs]
    assert told == [[], [], [], [f"video {row['video_key']}"], [f"video {row['video_key']}"]]


def test_the_table_counts_a_runs_losses_once() -> None:
    runs = [("one", ["judge", "judge", "scorer"], ("x",)), ("two", ["scorer"], ())]
    records = []
    for name, kinds, lost in runs:
        faults = [next(kind for kind in KINDS if kind.name == kind_name) for kind_name in kinds]
        hits = [Hit(Fault(kind, 0.5, 0), 1.0, frozenset(), lost_s=4.0) for kind in faults]
        done = Disturbed(hits, [], Difference(lost, ()), 0, [], [], 9.0)
        records += records_of(done, name, seed=7)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(records).splitlines()]
    assert rows[2:] == [
        ["judge", "2", "0", "1", "0", "4, at most 4"],
        ["scorer", "2", "1", "1", "0", "4, at most 4"],
        ["all", "4", "1", "1", "0", "4, at most 4"],
    ]
    assert json.loads(json.dumps(records)) == records


class Videos(Generation):
    """The stages of videos over verdicts that nobody had to wait for. The undisturbed outcome is what
    the stages themselves make of them here, in one process and without Ray."""

    name = "videos"
    nodes = {"video": {"video": 2}}  # noqa: RUF012
    # A batch whose node is lost is sent again before Ray knows, and so is left to the next pass.
    environment = {  # noqa: RUF012
        f"RAY_task_actor_unavailable_retry_delay_{name}_ms": "1000" for name in ("base", "max")
    }

    def sets(self) -> dict[str, object]:
        return {**super().sets(), "queries.path": self.folder / "few.json", "render.steps": 2}

    def prepare(self) -> None:
        queries = ["a cat", "the ocean at night", "two dogs", "a red kite", "rain on a window", "an owl"]
        (self.folder / "few.json").write_text(json.dumps(queries), "utf-8")
        given = self.command(self.reference)
        recipe = load(RECIPE, [given[i + 1] for i, part in enumerate(given) if part == "--set"])
        run = RunDir(self.reference)
        curate_queries(recipe, run)
        rows = CHAINS["generation"].expand(recipe, Models("", policy_id(recipe, run)))(
            list(run.table("queries").rows())
        )
        judged = [{**row, "prompt": f"{row['query']}, take {row['k']}", "verdict": "aligned"} for row in rows]
        run.table("verdicts").append(judged)
        with one_thread():
            rendered = Renderer(recipe.render, run.at("videos"), recipe.seed)(judged)
            run.table("feedback").append(Scorer(recipe.reward.located(), run.at("videos"))(rendered))
        make_pairs(recipe, run)
        self.lives = dict.fromkeys(("renderer", "scorer"), LIFE_S)

    def begin(self, folder: Path) -> None:
        for name in ("queries", "verdicts"):
            shutil.copytree(self.reference / name, folder / name)


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a replica that has less than one CPU: sums are taken in the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_killed_replicas_and_a_lost_node_change_nothing(tiny_models: Path, tmp_path: Path) -> None:
    with Nodes(Videos.nodes) as cluster:
        scene = Videos(tmp_path, tiny_models, cluster)
        scene.prepare()
        done = scene.disturb(draw(3, len(KILLED), KILLED), "disturbed")
    assert len(done.hits) >= 2, done.left
    assert (done.difference, done.wrong) == (Difference((), ()), [])
    assert (done.failures, done.left_behind) == (0, [])


class Here(Videos):
    """The same on the session's cluster, which has no kinds of nodes."""

    def sets(self) -> dict[str, object]:
        pools = {f"{name}.pool": "{num_cpus: 0.3}" for name in ("sample", "judge", "render", "reward")}
        return {**super().sets(), **pools}

    def rendered(self, folder: Path) -> int:
        """Videos whose rows are stored already."""
        return RunDir(folder).table("renders").count()


@pytest.mark.ray
@pytest.mark.engine
def test_a_killed_driver_and_a_killed_worker_change_no_row(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
) -> None:
    """SIGKILL to the driver in the middle of the videos; the same command again, whose renderer is killed."""
    import ray
    from ray._private.worker import _global_node

    raylet = _global_node.all_processes["raylet"][0].process.pid
    scene = Here(tmp_path, tiny_models, SimpleNamespace(address=ray.get_runtime_context().gcs_address))  # type: ignore[arg-type]
    scene.prepare()
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    scene.begin(folder)
    whole = RunDir(folder).table("verdicts").count()

    def goes_on(driver: Any, videos: int) -> int:
        deadline = time.monotonic() + 240
        while (done := scene.rendered(folder)) < videos:
            assert driver.poll() is None, end_of(log)
            assert time.monotonic() < deadline, end_of(log)
            time.sleep(0.05)
        return done

    first = scene.start(scene.command(folder), log)
    try:
        done = goes_on(first, 2)
    finally:
        first.kill()
        first.wait(timeout=30)
    assert done < whole, "it was killed in the middle"
    second = scene.start(scene.command(folder), log)
    try:
        done = goes_on(second, scene.rendered(folder) + 1)
        renderers = processes.find("renderer", processes.below(raylet))
        left = processes.kill(renderers[-1].pid)
        assert done < whole, "it was killed in the middle"
        assert second.wait(timeout=240) == 0, end_of(log)
    finally:
        second.kill()
        second.wait(timeout=30)
    assert processes.left([*renderers, *left], patience_s=15) == []
    assert scene.compare(folder) == (Difference((), ()), [])
