"""How many replicas each stage of one stream should have, so that none waits for another.

Pure arithmetic: stages run at the same time, so the stream takes as long as its slowest stage, and
a stage takes its work divided by its replicas.
"""

from __future__ import annotations

from collections.abc import Mapping

from vpo_ray.plan.cluster import Cluster, Replica, place


def balance(
    cluster: Cluster,
    replicas: Mapping[str, Replica],
    work: Mapping[str, float],
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int] | None:
    """Pool sizes with which the slowest stage ends soonest, with as few replicas as that takes.

    The stage that takes longest gets one more replica until it finds no room. No other sizes can be
    faster: whatever ends sooner gives every stage so far at least what it has by then.

    Args:
        replicas: what one replica of each stage reserves.
        work: replica-seconds of each stage that is balanced. Its replicas must take something that
            the cluster has a limited amount of.
        fixed: sizes of the others, whose work is not known.

    Returns:
        Sizes of all stages, or None where there is no room for one replica of each.
    """
    sizes = {name: (fixed or {}).get(name, 1) for name in replicas}
    if not _room(cluster, replicas, sizes):
        return None
    best, end = dict(sizes), makespan(work, sizes)
    while work:
        slowest = max(work, key=lambda name: work[name] / sizes[name])
        sizes[slowest] += 1
        if not work[slowest] or not _room(cluster, replicas, sizes):
            return best
        if makespan(work, sizes) < end:
            best, end = dict(sizes), makespan(work, sizes)
    return best


def makespan(work: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Seconds until the slowest stage has done its work."""
    return max((seconds / sizes[name] for name, seconds in work.items()), default=0.0)


def _room(cluster: Cluster, replicas: Mapping[str, Replica], sizes: Mapping[str, int]) -> bool:
    return bool(place(cluster, [replica for name, replica in replicas.items() for _ in range(sizes[name])]))
