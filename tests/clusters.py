"""Ray clusters of several nodes on this machine, for tests: each node is a raylet of its own.

They live beside whatever else runs here: own ports, own folder, own processes, and nothing of them is
left behind. A test drives them from processes of its own, as `vpo` is used, and looks at them from
outside through Ray's state.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

# Paths of Ray's sockets may have 107 characters, so its folders have short names.
SHORT = "/tmp"
ROOT = Path(__file__).parents[1]
# Ray takes it from the environment of whoever started before; these clusters are the loopback's alone.
OPEN = {"RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def head(
    log: Path, *arguments: str, env: Mapping[str, str] | None = None, cpus: float = 3
) -> Iterator[tuple[str, str]]:
    """A head node by `ray start`. Yields the address of the cluster and of its dashboard.

    Args:
        log: where its output goes.
        arguments: further ones of `ray start`.
        env: its environment; this process's, without authentication, when None.
    """
    folder = tempfile.mkdtemp(prefix="h", dir=SHORT)
    port, dashboard = free_port(), free_port()
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block"),
        *(f"--num-cpus={cpus:g}", f"--port={port}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=400000000"),
        *arguments,
    ]
    with open(log, "wb") as file:
        # Its own process group, so that exactly its processes can be stopped.
        node = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=dict(env or {**os.environ, **OPEN})
        )
    try:
        _wait_for(dashboard, node, log)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
        _kill_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert node.poll() is None, log.read_text("utf-8")
        assert time.monotonic() < deadline, "the head node did not start in time"
        time.sleep(0.5)


def _kill_all_of(folder: str) -> None:
    """Raylets that an autoscaler started are in no process group of ours; their command lines name our
    session's folder."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if f"{folder}/" in words and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


class Simulated:
    """A running cluster of raylets. `address` is what RAY_ADDRESS takes; `ids` are the nodes' ids by
    their names."""

    def __init__(self, cluster: Any, ids: Mapping[str, str]) -> None:
        self.cluster, self.address, self.ids = cluster, cluster.address, ids

    def ran_on(self, actor: str) -> set[str]:
        """Names of the nodes on which actors with `actor` in their class ever ran, by Ray's own table;
        an actor that never got a place counts as `nowhere`."""
        names = {node: name for name, node in self.ids.items()}
        return {
            names.get(info["Address"]["NodeID"], "nowhere")
            for info in self.cluster.global_state.actor_table(None).values()
            if actor in info["ActorClassName"]
        }


@contextmanager
def simulated(monkeypatch: Any, **nodes: Mapping[str, Any]) -> Iterator[Simulated]:
    """A head that takes no work, and a raylet for each of `nodes`, by name.

    Args:
        nodes: what `ray.cluster_utils.Cluster.add_node` takes: num_cpus, resources, labels,
            object_store_memory.
    """
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="c", dir=SHORT)
    # There Ray writes which cluster is the current one: nobody else on this machine is to join ours.
    Path(folder, "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_AUTH_MODE", OPEN["RAY_AUTH_MODE"])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder},
    )
    try:
        ids = {name: cluster.add_node(**settings).node_id for name, settings in nodes.items()}
        cluster.wait_for_nodes()
        yield Simulated(cluster, ids)
    finally:
        cluster.shutdown()
        _kill_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def autoscaled(log: Path, node_types: Mapping[str, Mapping[str, Any]], idle_s: float = 6) -> Iterator[str]:
    """A head that takes no work, with Ray's autoscaler (its second version), which starts and stops
    raylets here. Yields its address.

    Ray's own `AutoscalingCluster` does the same, but begins with `ray stop`, which ends every Ray
    process of the machine.

    Args:
        node_types: of its workers, as `available_node_types` of Ray's cluster YAML.
        idle_s: after so long a node that does nothing goes.
    """
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    gcs = free_port()
    provider: dict[str, Any] = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{gcs}",
        # There is nothing to install on these nodes.
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    env = {
        **os.environ,
        **OPEN,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        # As KubeRay and `ray up` tell their heads which group they are of.
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    head_type = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "test",
        "max_workers": 8,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "auth": {},
        "docker": {},
        "available_node_types": {
            **{name: {"node_config": {}, **given} for name, given in node_types.items()},
            "ray.head.default": head_type,
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        **{
            name: []
            for name in (
                *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
                *("setup_commands", "head_setup_commands", "worker_setup_commands"),
                *("head_start_ray_commands", "worker_start_ray_commands"),
            )
        },
        "file_mounts_sync_continuously": False,
    }
    file = log.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), "utf-8")
    # The last --port counts.
    options = (f"--autoscaling-config={file}", f"--port={gcs}")
    with head(log, *options, env=env, cpus=0) as (_, _):
        yield provider["gcs_address"]


def python(address: str, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on a cluster, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **OPEN, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
    )


def vpo(address: str, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command of `vpo` on a cluster."""
    return python(address, "-m", "vpo_ray.cli", *words, timeout=timeout)


def alive(address: str) -> list[dict[str, Any]]:
    """The nodes that are up in the cluster, as `ray.nodes()` gives them, without joining it."""
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    try:
        return [node for node in state.node_table() if node["Alive"]]
    finally:
        # A client whose cluster has gone ends this process a minute later.
        state.disconnect()


def kinds(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The worker groups of nodes, by our label."""
    return sorted(label for node in nodes if (label := node["Labels"].get("vpo-group")))
