"""Whether the cluster has nodes that a recipe's replicas and training workers fit on.

Ray waits for ever, and silently, for a node that does not exist. Here a run asks first, and goes on
asking while it streams: what no node has, and none that an autoscaler could add, ends it with the
missing resource named.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vpo_ray.recipe import Recipe, Training
from vpo_ray.stages import spec
from vpo_ray.stages.spec import StageSpec
from vpo_ray.stream import ray_compat

logger = logging.getLogger(__name__)

Amounts = Mapping[str, float]

# How often a waiting or streaming run looks at the cluster, in seconds.
LOOK_EVERY_S = 2.0


# Ray's own label of each node.
NODE_LABEL = "ray.io/node-id"


class PlacementError(RuntimeError):
    """No node of the cluster can take a replica or worker; the message says which, what it asks for
    and what there is."""


@dataclass(frozen=True)
class Shape:
    """What one replica or worker reserves, in one piece on one node.

    where: the recipe's key. count: how many of them must fit at the same time for the work to go on.
    """

    where: str
    resources: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)
    count: int = 1

    def __str__(self) -> str:
        amounts = ", ".join(f"{name} {amount:g}" for name, amount in self.resources.items())
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return f"{amounts or 'no resource'}" + (f" on a node labelled {labels}" if labels else "")


@dataclass(frozen=True)
class Node:
    resources: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterState:
    """The cluster now. `autoscaled`: an autoscaler runs, so that nodes may come; it names requests
    that none of its node types fits as `infeasible`."""

    nodes: Sequence[Node]
    autoscaled: bool = False
    infeasible: Sequence[Amounts] = ()


def pool_shapes(recipe: Recipe, stages: Sequence[str], excluded: Sequence[str] = ()) -> list[Shape]:
    """The replicas of these stages; the stream moves once there is one of each.

    Args:
        excluded: ids of nodes that take none.
    """
    return [_pool_shape(spec.stage(name), recipe, excluded) for name in stages]


def _pool_shape(stage: StageSpec, recipe: Recipe, excluded: Sequence[str]) -> Shape:
    pool, engine = stage.pool(recipe), stage.engine(recipe)
    amounts = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    if pool.accelerator_type:
        amounts[f"accelerator_type:{pool.accelerator_type}"] = 0.001
    # The pieces of a tensor-parallel engine may lie on several nodes.
    pieces = 1 if engine is None else engine.pieces
    labels = off_nodes(pool.labels, excluded, pieces)
    return Shape(f"{stage.key(recipe)}.pool", {k: v for k, v in amounts.items() if v}, labels, pieces)


def off_nodes(labels: Mapping[str, str], excluded: Sequence[str], pieces: int = 1) -> dict[str, str]:
    """A pool's labels, with what keeps its replicas off nodes. Ray places the pieces of one engine without
    labels, and a pool that names its nodes by id keeps them."""
    if not excluded or pieces > 1 or NODE_LABEL in labels:
        return dict(labels)
    return {**labels, NODE_LABEL: f"!in({','.join(excluded)})"}


def worker_shapes(phase: str, settings: Training) -> list[Shape]:
    """The workers of a training phase, which start together or not at all."""
    amounts = dict(settings.resources_per_worker)
    # Ray Train's own defaults.
    if settings.use_gpu or not amounts:
        amounts.setdefault("GPU" if settings.use_gpu else "CPU", 1.0)
    return [
        Shape(f"{phase}.workers", {k: v for k, v in amounts.items() if v}, settings.labels, settings.workers)
    ]


def problems(shapes: Sequence[Shape], state: ClusterState) -> list[str]:
    """What cannot be placed, a line each; empty where everything may be.

    An autoscaler may add nodes of which nothing is known here: then only what it calls infeasible
    is a problem.
    """
    if state.autoscaled:
        return [
            f"{shape.where}: a replica needs {shape}, and no node type of the autoscaler has that"
            for shape in shapes
            # Another job may ask for the same with other labels: what a node here has is no problem.
            if any(_same(shape.resources, request) for request in state.infeasible)
            and any(_unplaceable(shape, state.nodes))
        ]
    found = [line for shape in shapes for line in _unplaceable(shape, state.nodes)]
    return found or list(_oversubscribed(shapes, state.nodes))


def _unplaceable(shape: Shape, nodes: Sequence[Node]) -> Iterator[str]:
    right = [node for node in nodes if labelled(shape.labels, node.labels)]
    if any(covers(node.resources, shape.resources) for node in right):
        return
    line = f"{shape.where}: a replica needs {shape}, and "
    if not right:
        yield line + no_such_labels(shape.labels, [node.labels for node in nodes])
        return
    most = {name: max(node.resources.get(name, 0) for node in right) for name in shape.resources}
    lacking = [name for name, amount in shape.resources.items() if most[name] < amount]
    if lacking:
        yield line + "; ".join(
            f"no node has {name}" if not most[name] else f"no node has more {name} than {most[name]:g}"
            for name in lacking
        )
    else:
        yield line + "no node has all of these at once"


def _oversubscribed(shapes: Sequence[Shape], nodes: Sequence[Node]) -> Iterator[str]:
    needed: Counter[str] = Counter()
    for shape in shapes:
        for name, amount in shape.resources.items():
            needed[name] += amount * shape.count  # type: ignore[assignment]
    for name, amount in needed.items():
        there = sum(node.resources.get(name, 0) for node in nodes)
        # Ray counts in ten-thousandths.
        if round(amount - there, 4) > 0:
            users = ", ".join(
                f"{shape.where} {shape.resources[name] * shape.count:g}"
                for shape in shapes
                if name in shape.resources
            )
            yield f"{users}: together {amount:g} {name}, and the cluster has {there:g}"


def covers(has: Amounts, wanted: Amounts) -> bool:
    """Whether a node's amounts are enough for a replica's."""
    return all(has.get(name, 0) >= amount for name, amount in wanted.items())


def _same(a: Amounts, b: Amounts) -> bool:
    return {k: round(v, 4) for k, v in a.items()} == {k: round(v, 4) for k, v in b.items()}


def labelled(wanted: Mapping[str, str], has: Mapping[str, str]) -> bool:
    """Whether a node has the labels, as Ray reads them: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    return all(_is_label(has.get(name), value) for name, value in wanted.items())


def _is_label(has: str | None, wanted: str) -> bool:
    if wanted.startswith("!"):
        return not _is_label(has, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return has in [value.strip() for value in wanted[3:-1].split(",")]
    return has == wanted


def no_such_labels(wanted: Mapping[str, str], nodes: Sequence[Mapping[str, str]]) -> str:
    """The message where no node has the labels."""
    names = {f"{name}={labels[name]}" for labels in nodes for name in wanted.keys() & labels.keys()}
    return f"no node has these labels (there are {', '.join(sorted(names)) or 'none of these names'})"


def cluster_state() -> ClusterState:
    """The nodes that are up in the connected cluster, and what its autoscaler says."""
    import ray

    nodes = [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    state, report = ray_compat.cluster_status()
    autoscaled = _autoscaled(nodes, state.autoscaler_state_version, report)
    infeasible = [dict(request.resources_bundle) for request in state.infeasible_resource_requests]
    infeasible += [
        dict(request.resources_bundle)
        for gang in state.infeasible_gang_resource_requests
        for request in gang.requests
    ]
    return ClusterState(nodes, autoscaled, infeasible)


def _autoscaled(nodes: Sequence[Node], version: int, report: bytes | None) -> bool:
    """Whether the monitor of the head may add nodes. Every head has one that reports; without worker
    groups it only looks on: the first version then names node types `node_ID`, the second gives the
    nodes no group."""
    try:
        kinds = json.loads(report or b"{}").get("autoscaler_report", {}).get("active_nodes", {})
    except ValueError:
        kinds = {}
    if any(not kind.startswith("node_") for kind in kinds):
        return True
    return version > 0 and any("ray.io/node-group" in node.labels for node in nodes)


def require(shapes: Sequence[Shape], timeout_s: float) -> None:
    """Return once everything can be placed.

    Raises:
        PlacementError: it still cannot after `timeout_s`: nodes of a cluster that starts join late.
    """
    deadline = time.monotonic() + timeout_s
    warned = False
    while True:
        state = cluster_state()
        found = problems(shapes, state)
        if not found:
            return
        if time.monotonic() >= deadline:
            raise PlacementError(_message(found, state))
        if not warned:
            logger.warning("waiting up to %g s for nodes: %s", timeout_s, "; ".join(found))
            warned = True
        time.sleep(min(LOOK_EVERY_S, timeout_s / 4))


def room_for(shapes: Sequence[Shape]) -> bool:
    """Whether the nodes that are up can take all of these at the same time; none is without a cluster."""
    import ray

    return ray.is_initialized() and not problems(shapes, ClusterState(cluster_state().nodes))


@contextmanager
def watched(shapes: Sequence[Shape], timeout_s: float) -> Iterator[None]:
    """Interrupt the work within when something has had no place for `timeout_s`: a spot node went,
    and none comes. Only a main thread can be interrupted; any other is not watched.

    Raises:
        PlacementError: from within, as `require`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(shapes, timeout_s)
    before = signal.signal(signal.SIGUSR1, watch.interrupt)
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.reason is not None:
            raise PlacementError(watch.reason) from None
        raise
    finally:
        watch.over.set()
        watch.join(timeout=15)
        signal.signal(signal.SIGUSR1, before)


class _Watch(threading.Thread):
    """Looks at the cluster until `over`, and interrupts the thread that made it, with a `reason`."""

    def __init__(self, shapes: Sequence[Shape], timeout_s: float) -> None:
        super().__init__(name="placement", daemon=True)
        self.shapes, self.timeout_s = shapes, timeout_s
        self.over = threading.Event()
        self.reason: str | None = None
        self._watched = threading.get_ident()

    def run(self) -> None:
        since: float | None = None
        while not self.over.wait(LOOK_EVERY_S):
            try:
                state = cluster_state()
            except Exception:
                # The next look may say more; the work itself finds out when the cluster is gone.
                logger.debug("the cluster could not be looked at", exc_info=True)
                continue
            found = problems(self.shapes, state)
            since = (since or time.monotonic()) if found else None
            if since is not None and time.monotonic() - since > self.timeout_s:
                self.reason = _message(found, state)
                # A real signal also ends a wait inside Ray.
                signal.pthread_kill(self._watched, signal.SIGUSR1)

    def interrupt(self, *_: Any) -> None:
        if not self.over.is_set():
            # Of all exceptions, a wait inside `ray.get` lets only this one through.
            raise KeyboardInterrupt


def _message(found: Sequence[str], state: ClusterState) -> str:
    lines = "\n  ".join(found)
    return (
        f"the cluster cannot run this:\n  {lines}\nIts nodes: {_nodes(state.nodes)}\n"
        "Add such a node, or change the recipe's pools (`vpo plan --address auto` helps)"
    )


def _nodes(nodes: Sequence[Node]) -> str:
    kinds = Counter(
        ", ".join(
            f"{name} {amount:g}"
            for name, amount in sorted(node.resources.items())
            # Every node has one of its own, and bytes of memory are no one's request here.
            if not name.startswith("node:") and name not in ("memory", "object_store_memory")
        )
        for node in nodes
    )
    return "; ".join(f"{count} x ({kind or 'no CPU'})" for kind, count in kinds.most_common(8)) or "none"
