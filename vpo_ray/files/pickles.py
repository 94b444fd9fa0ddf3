"""Tensors of a pickle that others made, without running what is in it; see `pickle_child`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

TIMEOUT_S = 2 * 3600
# Of this process's environment, all that the other needs: no keys and no proxies.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "TMPDIR")


class PickleError(ValueError):
    """A pickle that cannot be read, or wants to run code; the message says what."""


def read_pickle(source: Path, target: Path, stand_ins: bool = False) -> list[str]:
    """Write the tensors of a file of `torch.save` to a safetensors file, in a process of its own without
    network, with limits of memory, time and file size.

    Args:
        stand_ins: the pickle may hold objects of classes (a whole module); otherwise only tensors.

    Returns:
        The names of the classes that were stood in for. None of them was imported.

    Raises:
        PickleError: it names a function or class that it may not, or is no file of `torch.save`.
    """
    asked = {"source": str(source.resolve()), "target": str(target.resolve()), "stand_ins": stand_ins}
    root = str(Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [
        sys.executable,
        "-P",
        "-c",
        "from vpo_ray.files.pickle_child import open_pickle; open_pickle()",
    ]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            env=environment,
            cwd=target.parent,
        )
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired as error:
        raise PickleError(f"{source}: not read after {TIMEOUT_S} s; it was stopped") from error
    except ValueError as error:
        last = (done.stderr.strip() or f"it ended with status {done.returncode}").rpartition("\n")[2]
        raise PickleError(f"{source}: the process that reads it failed: {last}") from error
    if answer["network"]:
        logger.warning(
            "the process that opens %s could not leave the network (%s): it had no other protection than its "
            "restricted reader, which imports nothing, and a bar on sockets and processes",
            source,
            answer["network"],
        )
    if "refused" in answer:
        raise PickleError(
            f"{source} wants to run code when it is opened ({answer['refused']}): it was not run, and "
            "nothing was converted. A file of weights needs no code: do not load this one elsewhere"
        )
    if "error" in answer:
        raise PickleError(f"{source} is no file of torch.save that can be read: {answer['error']}")
    found: list[str] = answer["stand_ins"]
    return found
