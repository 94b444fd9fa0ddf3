"""Failures of a worker: those that a retry may fix, and permanent ones.

Ray Train restarts all workers after any exception, up to `max_failures` times, with no way to exclude one.
So a worker records a permanent failure in a file, and restarted workers that find it stop at once.
"""

from __future__ import annotations

import contextlib

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.train.examples import TrainError

RECORD = "stopped.json"

# Faults of the program or its input. The network, disks, memory and devices raise others (OSError,
# MemoryError, and RuntimeError by torch).
_OURS = (
    TrainError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    NotImplementedError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def is_permanent(error: BaseException) -> bool:
    """Whether every retry would fail in the same way."""
    return isinstance(error, _OURS)


def record(folder: Folder, error: BaseException) -> None:
    """Record a permanent failure in the folder of a run's checkpoints."""
    said = str(error) if isinstance(error, TrainError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError, StorageError):  # the worst is a useless retry
        folder.write_json(RECORD, {"message": said})


def recorded(folder: Folder) -> str | None:
    """The message of a recorded failure, or None."""
    return str(folder.read_json(RECORD)["message"]) if folder.exists(RECORD) else None


def clear(folder: Folder) -> None:
    """Remove the record of an earlier call: its cause may be gone."""
    path = f"{folder.path}/{RECORD}"
    if folder.fs.get_file_info(path).type == pafs.FileType.File:
        folder.fs.delete_file(path)
