"""A cluster as the plan sees it, and whether replicas find room on its nodes.

It knows amounts of CPUs and GPUs by node, from the command line or from a running Ray cluster, and
neither recipes nor stages.
"""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from vpo_ray.stream.placement import covers, labelled

# Placing replicas is a packing problem; after so many tries it is given up.
TRIES = 20_000
DEEPEST = 200  # pieces, of which each is a call deep
# Nodes of this many GPUs are what clouds and vendors sell most; `--gpus-per-node` says otherwise.
GPUS_PER_NODE = 8
_TYPE = "accelerator_type:"
Labels = tuple[tuple[str, str], ...]
# CPUs and GPUs in ten-thousandths, type of GPU, labels
_Amounts = tuple[float, float, str | None, Labels | None]


class ClusterSpecError(ValueError):
    """A cluster that cannot be, or cannot be reached; the message says which."""


class NodeSize(NamedTuple):
    cpus: float  # infinite where nobody said
    gpus: float
    gpu_type: str | None
    labels: Labels | None = None  # None where nobody said: any may be there


@dataclass(frozen=True)
class Replica:
    """What one replica reserves: `pieces` (pipeline parallel stages) that may lie on several nodes,
    each with this many CPUs and GPUs on one node that has the labels."""

    cpus: float = 0
    gpus: float = 0
    gpu_type: str | None = None
    pieces: int = 1
    labels: Labels = ()

    @property
    def all_gpus(self) -> float:
        return self.gpus * self.pieces

    def fits(self, node: NodeSize) -> bool:
        mine, its = (
            {"CPU": one.cpus, "GPU": one.gpus, **({f"{_TYPE}{one.gpu_type}": 1} if one.gpu_type else {})}
            for one in (self, node)
        )
        return _has(node.labels, self.labels) and covers(its, mine)


@dataclass(frozen=True)
class Cluster:
    nodes: tuple[NodeSize, ...]

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpu_type(self) -> str | None:
        """The type of its GPUs if it has one only."""
        types = {node.gpu_type for node in self.nodes if node.gpus}
        return types.pop() if len(types) == 1 else None

    def __str__(self) -> str:
        types = sorted({node.gpu_type or "GPU" for node in self.nodes if node.gpus})
        gpus = f"{self.gpus:g} {' and '.join(types)}" if self.gpus else "no GPU"
        cpus = "CPUs not given" if math.isinf(self.cpus) else f"{self.cpus:g} CPUs"
        return f"{gpus}, {cpus}, {len(self.nodes)} node{'s'[: len(self.nodes) > 1]}"


def described(
    gpus: int, gpu_type: str | None = None, cpus: int | None = None, gpus_per_node: int | None = None
) -> Cluster:
    """A cluster by its totals: nodes of `gpus_per_node` GPUs, the last with what is left.

    Raises:
        ClusterSpecError: negative amounts, or nothing at all.
    """
    each = gpus_per_node or GPUS_PER_NODE
    if gpus < 0 or each < 1 or (cpus is not None and cpus < 1) or (not gpus and cpus is None):
        raise ClusterSpecError("a cluster has GPUs, CPUs or both: give positive numbers")
    sizes = [min(each, gpus - taken) for taken in range(0, gpus, each)] or [0]
    share = math.inf if cpus is None else cpus / len(sizes)
    return Cluster(tuple(NodeSize(share, size, gpu_type if size else None) for size in sizes))


def live(address: str | None, visit: Callable[[], None] = lambda: None) -> Cluster:
    """The nodes that are up in a running Ray cluster; `visit` is called while it is joined.

    Raises:
        ClusterSpecError: there is none at this address.
    """
    import ray

    _knock(address)
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterSpecError(f"no Ray cluster at {address}: {error}") from error
    try:
        nodes = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
        visit()
    finally:
        if not joined:
            ray.shutdown()
    return Cluster(tuple(_node(*node) for node in nodes))


def _knock(address: str | None) -> None:
    """Ray asks an address that nobody answers for minutes; this asks once."""
    place = re.fullmatch(r"(?:ray://)?(?P<host>[^/:]+):(?P<port>\d{1,5})", address or "")
    if place is None:
        return
    try:
        socket.create_connection((place["host"], int(place["port"])), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterSpecError(f"no Ray cluster at {address}: {error}") from error


def _node(resources: dict[str, float], labels: dict[str, str]) -> NodeSize:
    kind = next((name.removeprefix(_TYPE) for name in resources if name.startswith(_TYPE)), None)
    gpus = resources.get("GPU", 0.0)
    # Every node has some of its own (its id among them), which would make each look another than the next.
    own = tuple(sorted((k, v) for k, v in labels.items() if not k.startswith("ray.io/")))
    return NodeSize(resources.get("CPU", 0.0), gpus, kind if gpus else None, own)


def place(cluster: Cluster, replicas: Sequence[Replica]) -> bool | None:
    """Whether all these replicas find room at the same time.

    Returns:
        True or False, or None where no placement was found and not all were tried.
    """
    pieces = [replica for replica in replicas for _ in range(replica.pieces)]
    # What needs most goes first; a typed or labelled one before others, which have more choice.
    pieces.sort(key=lambda r: (r.gpus, r.cpus, r.gpu_type is not None, len(r.labels)), reverse=True)
    if not all(any(piece.fits(node) for node in cluster.nodes) for piece in pieces):
        return False
    free = [_counted(node) for node in cluster.nodes]
    wanted = [_counted(NodeSize(p.cpus, p.gpus, p.gpu_type, p.labels)) for p in pieces]
    if _total(wanted)[0] > _total(free)[0] or _total(wanted)[1] > _total(free)[1]:
        return False
    if _first_fit(list(free), wanted):
        return True
    search = _Search(free, wanted)
    return search.found() if len(wanted) <= DEEPEST else None


def _counted(node: NodeSize) -> _Amounts:
    """Amounts in ten-thousandths, in which Ray counts: sums of them are exact."""
    cpus = node.cpus if math.isinf(node.cpus) else round(node.cpus * 10_000)
    return cpus, round(node.gpus * 10_000), node.gpu_type, node.labels


@cache
def _has(node: Labels | None, wanted: Labels | None) -> bool:
    return not wanted or node is None or labelled(dict(wanted), dict(node))


def _total(amounts: Sequence[_Amounts]) -> tuple[float, float]:
    return sum(amount[0] for amount in amounts), sum(amount[1] for amount in amounts)


def _room(node: _Amounts, piece: _Amounts) -> bool:
    fits = piece[0] <= node[0] and piece[1] <= node[1] and piece[2] in (None, node[2])
    return fits and _has(node[3], piece[3])


def _less(node: _Amounts, piece: _Amounts) -> _Amounts:
    return node[0] - piece[0], node[1] - piece[1], *node[2:]


def _first_fit(free: list[_Amounts], wanted: Sequence[_Amounts]) -> bool:
    for piece in wanted:
        position = next((i for i, node in enumerate(free) if _room(node, piece)), None)
        if position is None:
            return False
        free[position] = _less(free[position], piece)
    return True


class _Search:
    """Every way to place the pieces, nodes that look alike counted once, until one succeeds."""

    def __init__(self, free: list[_Amounts], wanted: Sequence[_Amounts]) -> None:
        self.free, self.wanted, self.tries = free, wanted, 0

    def found(self) -> bool | None:
        found = self._place(0)
        return None if not found and self.tries >= TRIES else found

    def _place(self, index: int) -> bool:
        if index == len(self.wanted):
            return True
        seen = set()
        for position, node in enumerate(self.free):
            if node in seen or not _room(node, self.wanted[index]):
                continue
            if self.tries >= TRIES:
                return False
            self.tries += 1
            seen.add(node)
            self.free[position] = _less(node, self.wanted[index])
            if self._place(index + 1):
                return True
            self.free[position] = node
        return False
