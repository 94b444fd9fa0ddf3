"""Balanced pools: never more than the cluster has, and no other sizes end sooner."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.plan.balance import balance, makespan
from vpo_ray.plan.cluster import Cluster, NodeSize, Replica, described, place

GPU = Replica(gpus=1)


def test_the_loop_of_the_paper() -> None:
    """Replica-seconds as 0.2, 0.3, 90 and 2 a row: nearly all GPUs go to rendering."""
    work = {"sample": 8_000.0, "judge": 12_000.0, "render": 3_600_000.0, "score": 80_000.0}
    replicas = dict.fromkeys(work, GPU)
    assert balance(described(8), replicas, work) == {"sample": 1, "judge": 1, "render": 5, "score": 1}
    wide = balance(described(64), replicas, work)
    assert wide == {"sample": 1, "judge": 1, "render": 60, "score": 2}


def test_what_is_not_known_keeps_its_size() -> None:
    sizes = balance(described(8), {"a": GPU, "b": GPU}, {"a": 100.0}, {"b": 3})
    assert sizes == {"a": 5, "b": 3}


def test_no_more_replicas_than_help() -> None:
    """A second replica of the small stage would not end the large one sooner."""
    replicas = {"large": Replica(gpus=8), "small": GPU}
    assert balance(described(15), replicas, {"large": 100.0, "small": 90.0}) == {"large": 1, "small": 1}


@pytest.mark.parametrize("work", [{}, {"a": 0.0, "b": 0.0}])
def test_nothing_to_do(work: dict[str, float]) -> None:
    assert balance(described(4), {"a": GPU, "b": GPU}, work) == {"a": 1, "b": 1}


def test_no_room() -> None:
    assert balance(described(1), {"a": GPU, "b": GPU}, {"a": 1.0, "b": 1.0}) is None


_NODES = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=2)
_STAGES = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([0, 0.5, 1, 2]), st.integers(0, 20)), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=200)
@given(_NODES, _STAGES)
def test_no_sizes_end_sooner(nodes: list[tuple[int, int]], stages: list[tuple[int, float, int]]) -> None:
    """Against every allocation there is: each stage asks a CPU at least, so sizes are bounded."""
    cluster = Cluster(tuple(NodeSize(cpus, gpus, None) for cpus, gpus in nodes))
    replicas = {f"stage {i}": Replica(cpus, gpus) for i, (cpus, gpus, _) in enumerate(stages)}
    work = {f"stage {i}": float(seconds) for i, (_, _, seconds) in enumerate(stages)}
    most = int(cluster.cpus)

    def fits(sizes: dict[str, int]) -> bool:
        return bool(place(cluster, [replicas[name] for name, n in sizes.items() for _ in range(n)]))

    allocations = (
        dict(zip(replicas, sizes, strict=True))
        for sizes in itertools.product(range(1, most + 1), repeat=len(replicas))
        if sum(n * r.cpus for n, r in zip(sizes, replicas.values(), strict=True)) <= most
    )
    possible = [sizes for sizes in allocations if fits(sizes)]
    found = balance(cluster, replicas, work)
    if found is None:
        assert possible == []
        return
    assert fits(found)
    assert makespan(work, found) == min(makespan(work, sizes) for sizes in possible)
