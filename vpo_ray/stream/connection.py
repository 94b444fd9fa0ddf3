"""The connection of a command to its Ray cluster, and what a signal to end does to the command."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings

# A batch whose node is lost is sent again, once. Ray would do so in a tenth of a second, to the same
# dead address; in this time it has learnt of the loss, and sends the batch to the replica's next place.
NODE_DEATH_MS = "20000"
_RETRY_DELAYS = (
    "RAY_task_actor_unavailable_retry_delay_base_ms",
    "RAY_task_actor_unavailable_retry_max_delay_ms",
)

_CHATTY = ("ray.data", "ray.serve", "ray._private.authentication", "ray.llm", "ray.train", "httpx")

# Below Ray's folder for temporary files: /ray/session_<date and process>/sockets/plasma_store.
_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SOCKET_LIMIT = 107  # of a socket's path, in bytes


class ClusterError(RuntimeError):
    """There is no cluster that this command can join or start; the message says what to do."""


class ClusterSettingError(ValueError):
    """A variable of the environment that no cluster can be joined or started with."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the job was stopped, or its node is about to go."""


def connect(verbose: bool = False) -> None:
    """Join the cluster of this job or of RAY_ADDRESS, or start one on this machine.

    Raises:
        ClusterSettingError: RAY_ADDRESS is no address of a cluster, or TMPDIR is too long for sockets.
        ClusterError: nothing answers at RAY_ADDRESS, or no cluster can be started here.
    """
    # vLLM warns at import of what a driver without a GPU cannot do; its actors have their own level.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update({name: NODE_DEATH_MS for name in _RETRY_DELAYS if name not in os.environ})
    import ray

    if not verbose:
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        _join(verbose)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # see stream/progress.py
    # Ray 2.60 has no other way yet to say how often a pool's actors restart.
    warnings.filterwarnings("ignore", message="`ray_remote_args")
    if threading.current_thread() is threading.main_thread():
        # After Ray, which would exit at once.
        signal.signal(signal.SIGTERM, terminate)


def terminate(*_: object) -> None:
    # Whoever stops a job kills it seconds later: a second signal may not disturb the ledger's writing.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _join(verbose: bool) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ClusterSettingError(
            f"RAY_ADDRESS={address} is the address of a dashboard, to which jobs are submitted. Use `vpo "
            "submit` to run there; or unset RAY_ADDRESS, for a cluster on this machine; or, on a node of the "
            "cluster, set it to the head's own address, as in RAY_ADDRESS=10.0.0.1:6379"
        )
    if address in ("", "local"):
        _check_socket_paths()
    try:
        ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR)
    except Exception as error:  # Ray raises plain ones too, as for a raylet that does not start in time
        whole = str(error).strip() or type(error).__name__
        if address in ("", "local"):
            home = os.environ.get("HOME")
            hint = (
                ""
                if home and os.access(home, os.W_OK)
                else ". Ray keeps a cluster's token in the home directory, which is not there or cannot be "
                "written: set HOME to a folder that can be, as in HOME=/tmp"
            )
            raise ClusterError(f"no Ray cluster can be started on this machine: {whole}{hint}") from error
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {whole}\n"
            "Set it to the head's own address, as in RAY_ADDRESS=10.0.0.1:6379, or unset it for a cluster on "
            "this machine"
        ) from error


def _check_socket_paths() -> None:
    """Ray and vLLM put sockets into the folder for temporary files."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    longest = _SOCKET_LIMIT - len(_SOCKET)
    if len(os.fsencode(folder)) > longest:
        name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise ClusterSettingError(
            f"{name}={folder} is too long: Ray puts sockets below it, whose paths may have {_SOCKET_LIMIT} "
            f"bytes. Set {name} to a folder whose path has at most {longest} bytes, as in {name}=/tmp"
        )
