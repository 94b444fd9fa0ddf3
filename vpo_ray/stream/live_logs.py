"""What the living processes of a run write, wherever in its cluster they are, by Ray's state API."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpo_ray.records import Row
from vpo_ray.stream.last_words import without_secrets

logger = logging.getLogger(__name__)

TAIL_BYTES = 1 << 18  # of a log that is read here
# Seconds in which a cluster has to answer.
WAIT_S = 10
# The phases whose workers Ray Train starts; a run has one at a time.
TRAINED = ("sft", "dpo", "rl")
_CLASS = re.compile(r"MapBatches\((\w+)\)|RayTrain(Worker)")


class ClusterGoneError(RuntimeError):
    """The cluster does not answer; the message names its address."""


def cluster_here() -> Row | None:
    """The `address` of the cluster that this process is connected to, and its `job` there; None where it is
    connected to none."""
    import ray

    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return {"address": str(context.gcs_address), "job": context.get_job_id()}


def living_logs(cluster: Row, stage: str | None, lines: int) -> Iterator[tuple[str, str]]:
    """The last lines that each living process of a run's stages and training wrote.

    Args:
        cluster: as `cluster_here` gave it to the run's driver.
        stage: of this stage or phase only: `render`, `sft`, ...; of all where None.
        lines: of each process, at most.

    Yields:
        A process (what it works on, and where), and what it wrote, without secrets.

    Raises:
        ClusterGoneError: nobody answers at the address within WAIT_S.
    """
    address = str(cluster["address"])
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT_S):
            pass
    except (OSError, ValueError) as error:
        raise ClusterGoneError(f"no cluster answers at {address} any more ({error})") from error
    from ray.util.state import list_actors

    where: Any = {"address": address, "timeout": WAIT_S}
    mine: Any = [("state", "=", "ALIVE"), ("job_id", "=", cluster["job"])]
    try:
        actors = list_actors(filters=mine, limit=10_000, raise_on_missing_output=False, **where)
        found = [(name, actor) for actor in actors if (name := stage_of(str(actor.class_name)))]
        for name, actor in sorted(found, key=lambda entry: (entry[0], str(entry[1].actor_id))):
            if stage in (None, name) or (name == "training" and stage in TRAINED):
                yield (
                    f"{name}, process {actor.pid} of node {str(actor.node_id)[:12]}",
                    _written(actor, lines, where),
                )
    except Exception as error:  # of Ray, gRPC and HTTP
        raise ClusterGoneError(f"the cluster at {address} does not say what runs there: {error}") from error


def stage_of(class_name: str) -> str:
    """The stage of an actor by what Ray calls its class, `training` for a worker of Ray Train; "" for an
    actor that is neither."""
    found = _CLASS.search(class_name)
    return "" if found is None else found[1] or "training"


def _written(actor: Any, lines: int, where: Any) -> str:
    """What a process wrote: read here where it runs here, else asked of its node's agent. Why nobody can tell
    where that does not answer: it may be starting, or another cluster of its machine has its port."""
    texts = _here(actor)
    if not texts:
        from ray.util.state import get_log

        try:
            texts = [
                "".join(
                    get_log(actor_id=actor.actor_id, suffix=suffix, tail=lines, errors="replace", **where)
                )
                for suffix in ("out", "err")
            ]
        except Exception as error:
            logger.debug("no log of actor %s", actor.actor_id, exc_info=True)
            return f"(no log can be had: {error})"
    kept = [line for text in texts for line in text.splitlines() if not line.startswith(":")]
    return without_secrets("\n".join(kept[-lines:]))


def _here(actor: Any) -> list[str]:
    """The ends of the files that an actor's process of this machine writes to; none where it has none."""
    texts = []
    try:
        process = Path(f"/proc/{int(actor.pid)}")
        if str(actor.class_name) in process.joinpath("cmdline").read_bytes().decode(errors="replace"):
            for stream in ("1", "2"):
                log = process.joinpath("fd", stream).resolve()
                if log.is_file() and log.name.startswith("worker-"):
                    with log.open("rb") as file:
                        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
                        texts.append(file.read().decode(errors="replace"))
    except (OSError, TypeError, ValueError):  # it is elsewhere, another user's, or has ended
        return []
    return texts
