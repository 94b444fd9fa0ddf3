"""The terminal of a command: our own lines go to it as they are, those of libraries through a sieve.

Ray, torch, vLLM, transformers, DeepSpeed and what these use write to stderr from Python, from C++ and from
processes that they start, in a dozen formats that no setting reaches. So `set_apart` puts a pipe in place of
file descriptor 2, and a small program at its end, which leaves out what is below a warning, progress bars,
and the warnings in NOT_FOR_USERS. Whatever it does not know goes on: a traceback, an abort, a question. It is
a process of its own, so that the last words of one that crashes are not lost.

This file is also that program (`python -I -S terminal.py`), so it imports nothing but the standard library.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

# Lines below a warning, by how loggers write a level.
_BELOW_WARNING = re.compile(
    r"\d{4}-\d\d-\d\d[ T][\d:.,]+\s+(?:INFO|DEBUG)\b"  # Ray's and logging's
    r"|\[\d{4}-\d\d-\d\d [\d:.,]+ [ID] \d+ \d+\]"  # Ray's C++
    r"|\[[^\]]*\]\s*\[(?:INFO|DEBUG)\]"  # DeepSpeed's
    r"|(?:\([^)]*\) )?(?:INFO|DEBUG)[\s:]"  # vLLM's, Serve's
    r"|[ID]\d{4} \d\d:\d\d:\d\d"  # glog's, torch's
    r'|\{.*"level(?:name)?": "(?:INFO|DEBUG)"'  # JSON lines of Ray's loggers
)
# Warnings about calls that libraries make of each other: nothing that a recipe can change.
_DEPRECATED = re.compile(r".*\b(?:Pending)?DeprecationWarning: |.*\bFutureWarning: ")

# Warnings, and notes without a level, that a user cannot act on: what they contain, and why that is.
NOT_FOR_USERS = {
    "has constructor arguments in the object store and max_restarts": "the driver, which owns the arguments, "
    "lives as long as its actors",
    "Calling ray.init() again after it has already been called": "Ray's own libraries do so",
    "SIGTERM handler is not set because current thread": "Ray's own libraries join from threads, too",
    "Started a local Ray instance": "a command without a cluster always does",
    "No cloud storage mirror configured": "models are fetched by our own cache",
    "Progress bars disabled": "the command has a status of its own",
    "Setting accelerator to CPU": "DeepSpeed looks for a GPU in the driver, which needs none",
    "Loading a GGUF checkpoint with its weights packed": "a checkpoint is unpacked once, to be written anew",
    "ServeController.graceful_shutdown": "the endpoint has ended, and its controller with it",
    "UserWarning: `ray_remote_args": "Ray has no other way to say how often a pool's actors restart",
    "The maximum number of concurrent tasks": "a small pool has few tasks by intent",
    "FutureWarning: Tip: In future versions of Ray": "a choice that Ray's next version makes",
    "[torchao]": "kernels for GPUs, looked for where there is none",
    "Skipping import of cpp extensions": "kernels for GPUs, looked for where there is none",
    "The current process just got forked, after parallelism": "tokenizers go on without threads",
    "Disabling parallelism to avoid deadlocks": "the same",
    "- Avoid using `tokenizers` before the fork": "the same",
    "- Explicitly set the environment variable TOKENIZERS_PARALLELISM": "the same",
    "Unable to poll TPU GCE Metadata": "Ray looks for a TPU on every machine",
    "Overriding the current TF32 state": "vLLM sets what it needs",
    "There is a performance drop because": "of one GPU and driver, in vLLM's notes",
}
# A bar of tqdm, with or without a total, or of Ray Data.
_BAR = re.compile(
    r"[^\r\n]*?(?:\d+%\|[^|\r\n]*\|[^\[\r\n]*\[[^\]\r\n]*\]|\d+\w*it \[[^\]\r\n]*\])(?:, [\w=.]+)*"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Seconds after which the beginning of a line is shown: it may be a question.
PATIENCE_S = 0.3
# Seconds that the end of a command waits for what libraries said last.
LAST_WORDS_S = 2.0

# Loggers that write to stdout, which is the command's: they are sieved as they log.
ON_STDOUT = ("DeepSpeed",)

_ours: TextIO | None = None
_above: Callable[[str], None] | None = None


def ours() -> TextIO:
    """Where the package's own lines go that are no result: stderr, past the sieve where there is one."""
    return _ours or sys.stderr


class Lines:
    """A stream for our log's handler: its lines go above what is shown live, where anything is."""

    def write(self, text: str) -> None:
        (_above or ours().write)(text)

    def flush(self) -> None:
        ours().flush()


@contextmanager
def above(show: Callable[[str], None]) -> Iterator[None]:
    """Have `show` print our log's lines, while it shows something live below them."""
    global _above
    _above = lambda text: show(text.rstrip("\n"))  # noqa: E731
    try:
        yield
    finally:
        _above = None


def set_apart(own: TextIO) -> None:
    """Put the sieve between file descriptor 2 and where it leads, and write our own lines to `own`, which
    leads there too. Call it before a library is imported, in a process that has no thread yet.

    Where no process can be started, everything goes on unsieved. A second call does nothing.
    """
    global _ours
    if _ours is not None:
        return
    for name in ON_STDOUT:
        logging.getLogger(name).addFilter(_for_users)
    before = os.dup(2)
    try:
        sieve = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=before,
            cwd="/",
            start_new_session=True,  # a signal to the command's process group does not reach it
        )
    except OSError:
        os.close(before)
        return
    _ours = own
    assert sieve.stdin is not None
    os.dup2(sieve.stdin.fileno(), 2)
    sieve.stdin.close()

    # The first to be registered is the last to be called: behind what libraries do at the end.
    @atexit.register
    def end() -> None:
        sys.stderr.flush()
        own.flush()
        os.dup2(before, 2)
        try:
            sieve.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            sieve.returncode = 0  # a daemon holds the pipe: the sieve ends with it


def _for_users(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and Sieve().keep(record.getMessage()) is not None


class Sieve:
    """Decides line by line; lines that are indented below one that is left out belong to it."""

    def __init__(self) -> None:
        self._left_out = False

    def keep(self, line: str) -> str | None:
        """What of a line is shown, None for nothing. The line comes without its end."""
        plain = _COLOUR.sub("", line)
        said = _BAR.sub("", plain).replace("\r", "")
        if said != plain and not said.strip():
            return None
        if said[:1].isspace() and said.strip() and self._left_out:
            return None
        self._left_out = (
            _BELOW_WARNING.match(said) is not None
            or _DEPRECATED.match(said) is not None
            or any(part in said for part in NOT_FOR_USERS)
        )
        return None if self._left_out else (line if said == plain else said)


def _sift(source: int, target: int) -> None:
    """Copy lines until nobody has the other end of the pipe any more."""
    sieve, rest, parent = Sieve(), b"", os.getppid()
    passing = False  # the line's beginning is shown
    while True:
        ready = select.select([source], [], [], PATIENCE_S)[0]
        if not ready:
            if os.getppid() != parent:
                break
            # A bar goes on behind its carriage return.
            if rest and b"\r" not in rest and (passing or sieve.keep(_text(rest)) is not None):
                os.write(target, rest)
                rest, passing = b"", True
            continue
        data = os.read(source, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            said = line.decode("utf-8", "surrogateescape") if passing else sieve.keep(_text(line))
            passing = False
            if said is not None:
                os.write(target, said.encode("utf-8", "surrogateescape") + b"\n")
    if rest and (passing or sieve.keep(_text(rest)) is not None):
        os.write(target, rest)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _sift(0, 2)
