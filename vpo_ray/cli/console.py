"""Standard output and error as a command needs them: they may lose a character, never the command.

A terminal or log may be unable to encode a character, `| head` may close the pipe, and a service
manager may start a process without any of the three streams. None of that is the work's fault.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from vpo_ray import terminal

if TYPE_CHECKING:
    from vpo_ray.records import Shard


def forgive() -> None:
    """Make `sys.stdout` and `sys.stderr` lose what cannot be written. A disk that is full is an error."""
    _open_what_is_closed()
    sys.stdout = _forgiving(sys.stdout, sys.__stdout__, 1, "replace")
    sys.stderr = _forgiving(sys.stderr, sys.__stderr__, 2, "backslashreplace")


def sift_stderr() -> None:
    """What libraries write to stderr goes through `terminal`'s sieve from now on, once `forgive` was called;
    but not where somebody else's stream is in the place of stderr, who reads it as it is."""
    if isinstance(getattr(getattr(sys.stderr, "buffer", None), "raw", None), _Output):
        terminal.set_apart(_stream(os.dup(2), sys.stderr.encoding, "backslashreplace"))


def log_to_stderr(verbose: bool = False, shard: Shard | None = None) -> None:
    """Our log lines on stderr, others' only from warnings on (and see `terminal`). Ray's libraries put
    handlers of their own on the root logger, so ours does not pass its lines up."""
    if not verbose:
        sift_stderr()
    handler = logging.StreamHandler(terminal.Lines())
    name = f"shard {shard}: " if shard else ""
    line = f"%(asctime)s %(levelname).1s {name}%(message)s"
    handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    ours = logging.getLogger("vpo_ray")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)


class OutputError(RuntimeError):
    """What a command says goes to a file that takes no more."""


class _Output(io.FileIO):
    """A file descriptor that takes what nobody reads any more: a closed pipe, a terminal that hung up. What a
    full disk does not take is an error once, and what comes after it is lost."""

    _full = False

    def write(self, data: Any) -> int:
        if self._full:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self._full = True
                raise OutputError(f"the output cannot be written: {error.strerror}") from error
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
        made = _Results if descriptor == 1 else io.TextIOWrapper
        return _stream(descriptor, getattr(stream, "encoding", "utf-8"), errors, made)
    # Somebody else's, such as a test's.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=errors)
    return stream


class _Results(io.TextIOWrapper):
    """Standard output, which is for what was asked for: Ray prints there, too, from threads of its own."""

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return sys.stderr.write(text)
        return super().write(text)


def _stream(
    descriptor: int, encoding: str, errors: str, made: type[io.TextIOWrapper] = io.TextIOWrapper
) -> io.TextIOWrapper:
    return made(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors=errors,
        line_buffering=descriptor != 1 or os.isatty(descriptor),
    )


def _is_of(stream: Any, descriptor: int) -> bool:
    try:
        return bool(stream.fileno() == descriptor)
    except (OSError, ValueError, AttributeError):
        return False
