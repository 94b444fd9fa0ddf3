"""Failures of a worker: those that a retry may mend, and those that it cannot.

Ray Train starts all workers again after any exception, up to `max_failures` times, and knows no exception
for which it should not. So a worker leaves word of a failure that would come again, and workers that
find it end at once.
"""

from __future__ import annotations

import contextlib

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.train.examples import TrainError

WORD = "stopped.json"

# What the program or its input is to blame for. The network, disks, memory and devices raise others
# (OSError, MemoryError, and RuntimeError by torch).
_OURS = (
    TrainError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    NotImplementedError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def is_permanent(error: BaseException) -> bool:
    """Whether the failure would come again in every retry."""
    return isinstance(error, _OURS)


def record(folder: Folder, error: BaseException) -> None:
    """Leave word of a permanent failure in the folder of a run's checkpoints."""
    said = str(error) if isinstance(error, TrainError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError, StorageError):  # then it is tried again, for nothing
        folder.write_json(WORD, {"message": said})


def recorded(folder: Folder) -> str | None:
    """The message of a permanent failure that a worker has left."""
    return str(folder.read_json(WORD)["message"]) if folder.exists(WORD) else None


def clear(folder: Folder) -> None:
    """Remove the word of an earlier call: its cause may be gone."""
    path = f"{folder.path}/{WORD}"
    if folder.fs.get_file_info(path).type == pafs.FileType.File:
        folder.fs.delete_file(path)
