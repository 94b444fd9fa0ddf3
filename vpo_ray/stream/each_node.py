"""A small task on every node of the connected cluster: what a node sees, only a process there can say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# A node that has not answered after this many seconds cannot start a worker.
ANSWER_S = 60


class Visit(NamedTuple):
    """What a node answered.

    Args:
        node: as ray.nodes() gives it.
        answer: what the task returned, or None.
        failure: why there is no answer.
        asked_at, answered_at: by this machine's clock, in seconds.
    """

    node: Mapping[str, Any]
    answer: Any
    failure: str
    asked_at: float
    answered_at: float

    @property
    def where(self) -> str:
        name = self.node["NodeManagerHostname"] or self.node["NodeManagerAddress"]
        return f"{name} ({self.node['NodeID'][:8]})"


def each_node(function: Callable[[Any], Any], argument: Any) -> Iterator[Visit]:
    """Call `function(argument)` on every node that is alive; nodes come as they answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked_at = time.time()
    calls = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls[task.options(scheduling_strategy=there).remote(argument)] = node
    waiting, deadline = list(calls), time.monotonic() + ANSWER_S
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            break
        answered_at = time.time()
        for call in ready:
            answer, failure = None, ""
            try:
                answer = ray.get(call)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                failure = f"the probe failed: {lines[-1] if lines else type(error).__name__}"
            yield Visit(calls[call], answer, failure, asked_at, answered_at)
    for call in waiting:
        yield Visit(calls[call], None, f"no answer within {ANSWER_S} s", asked_at, time.time())
