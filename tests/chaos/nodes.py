"""A Ray cluster of several nodes on one machine, of which one can be lost and replaced.

A node is a raylet with its own workers and its own object store. Custom resources stand for the kinds
of GPUs, and a recipe's pools ask for them. The head has no CPU, as on a cluster where it only manages.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping

import psutil

from chaos import processes

STORE_BYTES = 80 * 2**20


class Nodes:
    """Use as a context manager.

    Args:
        kinds: the custom resources of each node, by its name.
        head_cpus: logical CPUs of the head.
    """

    def __init__(self, kinds: Mapping[str, Mapping[str, float]], head_cpus: int = 0) -> None:
        import ray._common.utils
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)
        self.kinds = kinds
        # The paths of Ray's sockets may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="c", dir="/tmp")
        head = {"num_cpus": head_cpus, "temp_dir": self._folder, "include_dashboard": False}
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES}
        )
        # No other Ray of this machine's user may join it by chance.
        ray._common.utils.reset_ray_address()
        self._nodes = {kind: self._add(kind) for kind in kinds}

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self._nodes.values(), self._cluster.head_node]:
            # A node that is asked to leave waits half a minute for its work.
            self._cluster.remove_node(node, allow_graceful=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        return self._cluster.address

    def _add(self, kind: str) -> object:
        return self._cluster.add_node(
            num_cpus=1, resources=dict(self.kinds[kind]), object_store_memory=STORE_BYTES
        )

    def raylet(self, kind: str) -> int:
        """The raylet's process id."""
        return self._nodes[kind].all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]

    def workers(self) -> list[psutil.Process]:
        """All that runs on all nodes."""
        head = self._cluster.head_node.all_processes["raylet"][0].process.pid
        return [
            process for raylet in (head, *map(self.raylet, self.kinds)) for process in processes.below(raylet)
        ]

    def of(self, pid: int) -> str | None:
        """The node of a worker process or of what it started; None for processes of the head."""
        try:
            parents = {parent.pid for parent in psutil.Process(pid).parents()}
        except psutil.NoSuchProcess:
            return None
        return next((kind for kind in self.kinds if self.raylet(kind) in parents), None)

    def replace(self, kind: str) -> None:
        """Start a node of the kind of one whose raylet was killed, as an autoscaler would."""
        self._cluster.remove_node(self._nodes[kind], allow_graceful=False)
        self._nodes[kind] = self._add(kind)

    def lose(self, kind: str) -> list[psutil.Process]:
        """SIGKILL the raylet of a node; what ran on it, which should end by itself."""
        return processes.kill(self.raylet(kind))
