"""Ray's own autoscaler, with a provider that starts raylets on this machine in place of GPU nodes.

From no worker at all, rendering brings up what its pool asks for and training what its workers ask for;
all of them go when they are idle. What no node type has is told within a minute. The engines are real;
the GPU that rendering reserves is none, and a custom resource stands for those of training.
"""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from clusters import alive, autoscaled, kinds, vpo
from test_node_kinds import TINY, options, verdicts

from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

NODE_TYPES = {
    "generate": {
        "resources": {"CPU": 2, "GPU": 1},
        "labels": {"vpo-group": "generate"},
        "min_workers": 0,
        "max_workers": 3,
    },
    "train": {
        "resources": {"CPU": 2, "trainer": 2},
        "labels": {"vpo-group": "train"},
        "min_workers": 0,
        "max_workers": 1,
    },
}
POOLS = [
    "sft=null",
    "render.pool={size: 2, num_cpus: 0.3, num_gpus: 1, labels: {vpo-group: generate}}",
    "dpo.resources_per_worker={CPU: 0.5, trainer: 1}",
    "dpo.labels={vpo-group: train}",
    "limits.placement_timeout_s=30",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Any:
    log = tmp_path_factory.mktemp("head") / "head.log"
    with autoscaled(log, NODE_TYPES) as address:
        yield address


class Watch:
    """Which worker groups were up at the same time, looked at while something runs."""

    def __init__(self, address: str) -> None:
        self.address, self.seen = address, set[tuple[str, ...]]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=130)

    def _look(self) -> None:
        while not self._over.wait(1):
            self.seen.add(tuple(kinds(alive(self.address))))


def pairs(count: int) -> list[Row]:
    return [
        {
            "pair_id": f"pair-{n:02}",
            "query_id": f"query-{n:02}",
            "query": f"a cat, take {n}",
            "chosen": "A cat sits on green grass in the sun.",
            "rejected": "cat, video",
            "kind": "video",
            "margin": 1.0,
            "chosen_id": f"c{n}",
            "rejected_id": f"r{n}",
        }
        for n in range(count)
    ]


def recipe_of(tiny_sets: list[str], folder: Path, *more: str) -> tuple[Recipe, list[str]]:
    sets = [f"out={folder / 'run'}", *POOLS, *more]
    return load(TINY, [*tiny_sets[1::2], *sets]), [*tiny_sets, *options(sets)]


def down(address: str, within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while found := kinds(alive(address)):
        assert time.monotonic() < deadline, f"{found} stay up"
        time.sleep(2)


def test_pools_bring_up_what_they_ask_for_and_it_goes_again(
    address: str, tiny_sets: list[str], tmp_path: Path
) -> None:
    recipe, sets = recipe_of(tiny_sets, tmp_path)
    run = RunDir(recipe.out)
    run.table("verdicts").append(verdicts(recipe, 12))
    run.table("pairs").append(pairs(8))
    assert kinds(alive(address)) == [], "no worker before anyone asks"
    with Watch(address) as watch:
        told = vpo(address, "render", TINY, *sets)
    assert told.returncode == 0, told.stderr[-6000:]
    assert all(row["video_key"] for row in run.table("renders").rows())
    assert ("generate", "generate") in watch.seen, "one node for each of the two replicas"
    assert not any("train" in groups for groups in watch.seen)
    down(address)

    with Watch(address) as watch:
        told = vpo(address, "dpo", TINY, *sets)
    assert told.returncode == 0, told.stderr[-6000:]
    assert run.exists("checkpoints/dpo/vpo.json")
    assert ("train",) in watch.seen, "both workers on the one node that has room for two"
    assert not any("generate" in groups for groups in watch.seen)
    down(address)


def test_what_no_node_type_has_is_told_within_a_minute(
    address: str, tiny_sets: list[str], tmp_path: Path
) -> None:
    recipe, sets = recipe_of(tiny_sets, tmp_path, "render.pool.num_gpus=8")
    run = RunDir(recipe.out)
    run.table("verdicts").append(verdicts(recipe, 2))
    began = time.monotonic()
    told = vpo(address, "render", TINY, *sets)
    took = time.monotonic() - began
    assert told.returncode == 1, told.stderr[-6000:]
    assert "render.pool: a replica needs CPU 0.3, GPU 8" in told.stderr
    assert "no node type of the autoscaler has that" in told.stderr
    # The driver's own imports and its farewell are in it.
    assert took < 60
    assert run.table("renders").count() == 0


def test_training_workers_that_no_node_type_takes_are_told_too(
    address: str, tiny_sets: list[str], tmp_path: Path
) -> None:
    recipe, sets = recipe_of(tiny_sets, tmp_path, "dpo.resources_per_worker.quantum_disk=1")
    RunDir(recipe.out).table("pairs").append(pairs(8))
    told = vpo(address, "dpo", TINY, *sets, timeout=120)
    assert told.returncode == 1, told.stderr[-6000:]
    assert "dpo.workers: a replica needs" in told.stderr
    assert "quantum_disk 1" in told.stderr
    assert "no node type of the autoscaler has that" in told.stderr
