"""Whether replicas find room on a cluster's nodes, however the cluster was told."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.plan import cluster as clusters
from vpo_ray.plan.cluster import Cluster, ClusterSpecError, NodeSize, Replica, described, live, place


def test_a_cluster_by_its_totals() -> None:
    assert described(16, "H100", 128) == Cluster((NodeSize(64, 8, "H100"),) * 2)
    assert described(2, "A100").nodes == (NodeSize(math.inf, 2, "A100"),)
    assert [node.gpus for node in described(10, gpus_per_node=4).nodes] == [4, 4, 2]
    assert described(0, cpus=4) == Cluster((NodeSize(4, 0, None),))
    assert str(described(16, "H100", 128)) == "16 H100, 128 CPUs, 2 nodes"
    assert str(described(1)) == "1 GPU, CPUs not given, 1 node"


@pytest.mark.parametrize(
    "wrong", [{"gpus": 0}, {"gpus": -1}, {"gpus": 4, "cpus": 0}, {"gpus": 4, "gpus_per_node": -2}]
)
def test_a_cluster_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ClusterSpecError):
        described(**wrong)


@pytest.mark.ray
def test_a_running_cluster(ray_cluster: None) -> None:
    found = live("auto")
    assert (found.cpus, found.gpus, found.gpu_type) == (4, 0, None)
    assert [node.labels for node in found.nodes] == [()], "Ray's own labels are no one's group"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:99999"])
def test_a_cluster_that_nobody_answers_for(address: str) -> None:
    with pytest.raises(ClusterSpecError, match=f"no Ray cluster at {address}"):
        live(address)


@pytest.mark.parametrize(
    ("replicas", "room"),
    [
        ([Replica(gpus=8), Replica(gpus=8)], True),
        ([Replica(gpus=9)], False),
        ([Replica(gpus=16, pieces=1)], False),
        ([Replica(gpus=8, pieces=2)], True),
        ([Replica(gpus=5)] * 3, False),
        ([Replica(gpus=0.1)] * 160, True),
        ([Replica(gpus=0.1)] * 161, False),
        ([Replica(gpus=1, gpu_type="H100")] * 16, True),
        ([Replica(gpus=1, gpu_type="A100")], False),
        ([Replica(cpus=10, gpus=1)] * 12, True),
        ([Replica(cpus=11, gpus=1)] * 12, False),
        ([], True),
    ],
)
def test_room(replicas: list[Replica], room: bool) -> None:
    assert place(described(16, "H100", 128), replicas) is room


def test_first_fit_is_not_the_last_word() -> None:
    """Largest first puts 4 beside 3 and finds no room for the twos; 3 + 3 beside 4 + 2 does."""
    nodes = Cluster((NodeSize(6, 0, None), NodeSize(6, 0, None), NodeSize(6, 0, None)))
    assert place(nodes, [Replica(cpus=n) for n in (4, 3, 3, 2, 2, 2, 2)]) is True
    assert place(nodes, [Replica(cpus=n) for n in (4, 4, 4, 3, 3)]) is False


def test_a_search_that_is_given_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "TRIES", 3)
    nodes = Cluster((NodeSize(6, 0, None), NodeSize(5, 0, None), NodeSize(7, 0, None)))
    assert place(nodes, [Replica(cpus=n) for n in (4, 4, 4, 3, 3)]) is None


_NODES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=3)
_PIECES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=4)


@settings(deadline=None, max_examples=200)
@given(_NODES, _PIECES)
def test_room_is_found_where_there_is_any(
    nodes: list[tuple[int, int]], pieces: list[tuple[int, int]]
) -> None:
    def holds(where: tuple[int, ...], node: int, kind: int) -> bool:
        asked = sum(piece[kind] for piece, at in zip(pieces, where, strict=True) if at == node)
        return asked <= nodes[node][kind]

    places = itertools.product(range(len(nodes)), repeat=len(pieces))
    room = any(all(holds(w, n, k) for n in range(len(nodes)) for k in (0, 1)) for w in places)
    cluster = Cluster(tuple(NodeSize(cpus, gpus, None) for cpus, gpus in nodes))
    assert place(cluster, [Replica(cpus, gpus) for cpus, gpus in pieces]) is room


_A, _B = (("group", "a"),), (("group", "b"),)


@pytest.mark.parametrize(
    ("nodes", "labels", "room"),
    [
        ([_A, _B], [_A, _B], True),
        ([_A, _B], [_A, _A], False),
        ([_A, _B], [_A, ()], True),
        ([_A, ()], [_B], False),
        ([None, None], [_A, _B], True),
        ([_A], [(("group", "in(a,c)"),)], True),
        ([_A], [(("group", "!b"),)], True),
    ],
)
def test_labels_keep_replicas_apart(nodes: list[Any], labels: list[Any], room: bool) -> None:
    """One replica fits on each node. Labels of a described cluster are not known, and may be there."""
    cluster = Cluster(tuple(NodeSize(1, 1, None, given) for given in nodes))
    assert place(cluster, [Replica(1, 1, labels=asked) for asked in labels]) is room


def test_a_label_goes_before_who_has_a_choice() -> None:
    nodes = Cluster((NodeSize(1, 0, None, _A), NodeSize(1, 0, None, ())))
    assert place(nodes, [Replica(cpus=1), Replica(cpus=1, labels=_A)]) is True
