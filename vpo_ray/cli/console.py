"""Standard output and error as a command needs them: they may lose a character, never the command.

A terminal or log may be unable to encode a character, `| head` may close the pipe, and a service
manager may start a process without any of the three streams. None of that is the work's fault.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


def forgive() -> None:
    """Make `sys.stdout` and `sys.stderr` lose what cannot be written. A disk that is full is an error."""
    _open_what_is_closed()
    sys.stdout = _forgiving(sys.stdout, sys.__stdout__, 1, "replace")
    sys.stderr = _forgiving(sys.stderr, sys.__stderr__, 2, "backslashreplace")


class _Output(io.FileIO):
    """A file descriptor that takes what nobody reads any more: a closed pipe, a terminal that hung up."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def _open_what_is_closed() -> None:
    """The next file to be opened would get the number of a closed standard stream, and what is printed
    by libraries would go into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _forgiving(stream: Any, own: Any, descriptor: int, errors: str) -> Any:
    if stream is None or (stream is own and _is_of(stream, descriptor)):
        if stream is not None:
            stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors=errors,
            line_buffering=descriptor == 2 or os.isatty(descriptor),
        )
    # Somebody else's, such as a test's.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=errors)
    return stream


def _is_of(stream: Any, descriptor: int) -> bool:
    try:
        return bool(stream.fileno() == descriptor)
    except (OSError, ValueError, AttributeError):
        return False
