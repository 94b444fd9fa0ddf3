"""What a process that died said last: kept in the run's `logs/`, and recognised where it has a known cause.

Ray's own folder for logs goes with its node or its session. Values of secrets are taken out.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from vpo_ray.files.folder import StorageError
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.ray_compat import session_logs

logger = logging.getLogger(__name__)

FOLDER = "logs"
KEPT_LINES = 300
# Logs of one kind that are kept, and lines that an error shows.
MOST = 8
SHOWN = 5

# What the last words of a process contain, and what to do.
CAUSES = (
    (
        r"less than desired CPU memory utilization|No available memory for the cache blocks.*CPU",
        "the machine's memory is full: stop what else runs there, or lower VLLM_CPU_KVCACHE_SPACE (GiB, in "
        "the engine's env)",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY"
        r"|No available memory for the cache blocks|less than desired GPU memory utilization",
        "the GPU's memory is full: lower batch_size, micro_batch or engine.gpu_memory_utilization, give each "
        "replica a whole GPU (pool.num_gpus), or take a smaller or quantised model",
    ),
    (
        r"lib(?:cuda|cudart|nvidia-ml)\.so[.\d]*: cannot open shared object|Found no NVIDIA driver"
        r"|CUDA driver version is insufficient",
        "this node has no driver for its GPU that the process can see: install it, start the container with "
        "--gpus all, or keep the pool off such nodes by `labels`",
    ),
    (
        r"/dev/shm.*(?:No space|full|too small)|No space left on device.*/dev/shm|Bus error"
        r"|insufficient shared memory",
        "/dev/shm is full: give the container more (docker: --shm-size 16g; Kubernetes: an emptyDir of "
        "medium Memory at /dev/shm)",
    ),
    (
        r"gated repo|GatedRepoError|Access to model .* is restricted|401 Client Error.*huggingface"
        r"|Invalid user token",
        "the model is gated: accept its licence on its page, and set HF_TOKEN on every node",
    ),
    (
        r"\bOOM\b|Out of memory: Killed|killed due to the node running low on memory|MemoryError"
        r"|Cannot allocate memory",
        "the node's memory is full: fewer replicas a node (pool.num_cpus), smaller batches, or larger nodes",
    ),
    (r"No space left on device", "a disk is full: free it, or move the model cache and the temporary files"),
)
_ACTOR = re.compile(r"^:(?:actor_name|job_id|task_name):.*\n?", re.MULTILINE)
_SECRET = re.compile(
    r"(?i)\b(?:hf_|sk-|AKIA|ghp_|xox[bp]-)[\w-]{8,}|(?<=bearer )\S+"
    r"|(?<=api_key=)\S+|(?<=token=)\S+|(?<=password=)\S+"
)
_SECRET_NAME = re.compile(r"(?i)KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def advice(text: str) -> str | None:
    """What to do about the known cause that a text tells of; None where it tells of none."""
    return next((what for pattern, what in CAUSES if re.search(pattern, text)), None)


def without_secrets(text: str) -> str:
    """The text without values of this process's secret variables, and what looks like a key."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return _SECRET.sub("<secret>", text)


def with_causes(message: str, run: RunDir | None = None, of: str = "") -> str:
    """A message with the last words of the dead processes whose class is called so, and what to do.

    Args:
        run: whose `logs/` get their logs.
        of: how Ray names them, such as `MapBatches(render)`.
    """
    last = keep_logs(run, of) if run is not None else ""
    parts = [message]
    if last:
        parts.append("the last lines of its log:\n  " + "\n  ".join(last.splitlines()[-SHOWN:]))
    if (what := advice(f"{message}\n{last}")) is not None:
        parts.append(f"What to do: {what}")
    return "\n".join(parts)


def keep_logs(run: RunDir, of: str) -> str:
    """Copy the ends of dead workers' logs into the run's `logs/`; returns the last that says anything, ""
    where nobody can be asked (the state API is part of Ray's dashboard)."""
    last = ""
    try:
        for worker, text in _dead_workers():
            if of in text:
                kept = without_secrets(_ACTOR.sub("", text)).strip()
                name = re.sub(r"\W+", "-", of).strip("-").removeprefix("MapBatches-")
                run.write(f"{FOLDER}/{name}-{worker[:12]}.log", f"{kept}\n".encode())
                last = kept or last
    except StorageError as error:
        logger.warning("no log of %s can be kept: %s", of, error)
    except Exception:  # of many kinds; the error that is told has its own message
        logger.debug("no log of %s can be had", of, exc_info=True)
    return last


def said_here(of: str) -> str:
    """What this node's last process of that name wrote, as far as its log ends; "" where there is none. For
    processes that Ray ended by intent, such as replicas that did not start."""
    for path in sorted(session_logs().glob("worker-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        text = path.read_text("utf-8", "replace")
        if of in text[:2000] and "Error" in text:
            return without_secrets("\n".join(text.splitlines()[-KEPT_LINES:]))
    return ""


def errors_in(text: str) -> list[str]:
    """The messages of the exceptions that a log tells of, the last few, each once."""
    found = [line.strip()[:600] for line in re.findall(r"\b\w*(?:Error|Exception): .+", text)]
    return list(dict.fromkeys(line for line in found if "(most recent call last)" not in line))[-SHOWN:]


def _dead_workers() -> Iterator[tuple[str, str]]:
    """The ids of the last workers that ended otherwise than by intent, and the ends of their logs."""
    import ray
    from ray.util.state import get_log, list_logs, list_workers

    context = ray.get_runtime_context()
    where: Any = {"address": context.gcs_address, "timeout": 10}
    dead = [
        worker
        for worker in list_workers(filters=[("is_alive", "=", "False")], limit=1000, detail=True, **where)
        if not str(worker.exit_type).startswith("INTENDED")
    ]
    for worker in sorted(dead, key=lambda worker: worker.end_time_ms or 0)[-MOST:]:
        glob = f"worker-{worker.worker_id}-*"
        if worker.node_id == context.get_node_id():
            texts = [
                path.read_text("utf-8", "replace") for path in sorted(session_logs().glob(glob), reverse=True)
            ]
        else:
            named = list_logs(node_id=worker.node_id, glob_filter=glob, **where).values()
            names = sorted({name for names in named for name in names}, reverse=True)
            texts = [
                "".join(
                    get_log(node_id=worker.node_id, filename=name, tail=KEPT_LINES, errors="replace", **where)
                )
                for name in names
            ]
        lines = [line for text in texts for line in text.splitlines()]
        # Who it was stands at the beginning.
        yield (
            worker.worker_id,
            "\n".join([*(line for line in lines if _ACTOR.match(line)), *lines[-KEPT_LINES:]]),
        )
