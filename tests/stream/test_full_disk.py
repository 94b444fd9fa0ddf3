"""A node whose disk is full: its rows are taken on the other nodes; where all are full, the run says so.

The node is a raylet in a mount namespace of its own, where a filesystem of a few blocks lies over the
store of the videos.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import Simulated, alive, simulated, vpo

from vpo_ray.loop.policies import policy_id
from vpo_ray.recipe import load
from vpo_ray.records import query_id
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
APART = ["unshare", "--map-root-user", "--mount"]
WORKER = {"num_cpus": 2, "resources": {"renderer": 1}}


@contextmanager
def full_node(cluster: Simulated, store: Path, log: Path) -> Iterator[None]:
    """A worker that sees a full disk at `store`, beside the cluster's nodes."""
    ray = Path(sys.executable).parent / "ray"
    start = [str(ray), "start", "--block", f"--address={cluster.address}", "--num-cpus=2"]
    start += ["--resources", '{"renderer": 1}', "--object-store-memory=100000000"]
    script = f"mount -t tmpfs -o size=8k tmpfs {shlex.quote(str(store))} && exec {shlex.join(start)}"
    count = len(alive(cluster.address))
    with open(log, "wb") as file:
        node = subprocess.Popen(
            [*APART, "sh", "-c", script], stdout=file, stderr=file, start_new_session=True
        )
    try:
        for _ in range(120):
            if len(alive(cluster.address)) > count:
                break
            assert node.poll() is None, log.read_text("utf-8")
            with pytest.raises(subprocess.TimeoutExpired):
                node.wait(0.5)
        yield
    finally:
        node.terminate()
        node.wait(timeout=60)


@pytest.mark.parametrize("others", [1, 0], ids=["another-node-has-room", "none-has"])
def test_rows_of_a_full_node(
    tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    if subprocess.run([*APART, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces may be made here")
    sets = [*tiny_sets, "--set", f"out={tmp_path / 'run'}", "--set", "sft=null"]
    sets += ["--set", f"render.pool={{size: {others + 1}, num_cpus: 1, resources: {{renderer: 1}}}}"]
    recipe = load(TINY, sets[1::2])
    run = RunDir(recipe.out)
    queries = [f"a cat in the rain, take {n}" for n in range(4)]
    rows = [
        {"query_id": query_id(q), "query": q, "source": "t", "split": "dpo", "unsafe": False} for q in queries
    ]
    policy = policy_id(recipe, run)
    firsts = [next(iter(candidates(row, recipe.sample, policy, recipe.seed))) for row in rows]
    run.table("verdicts").append([{**row, "prompt": row["query"], "verdict": "aligned"} for row in firsts])
    store = tmp_path / "run/videos"
    store.mkdir()
    nodes = {f"good{n}": WORKER for n in range(others)}
    # Splitting and reading run on the head, which has no renderer.
    with (
        simulated(monkeypatch, helper={"num_cpus": 1}, **nodes) as cluster,
        full_node(cluster, store, tmp_path / "node.log"),
    ):
        told = vpo(cluster.address, "render", TINY, *sets)
    assert "No space left on device" in told.stderr, told.stderr[-6000:]
    if not others:
        assert told.returncode == 1
        assert run.table("renders").count() == 0
        return
    assert told.returncode == 0, told.stderr[-6000:]
    assert "rows are taken on the other nodes" in told.stderr
    rows = list(run.table("renders").rows())
    assert len(rows) == 4
    assert all(row["error"] is None for row in rows)
    assert {path.stem for path in store.rglob("*.mp4")} == {row["video_key"] for row in rows}
