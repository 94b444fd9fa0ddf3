"""Ends the processes of a worker with the worker, and the worker with its raylet, however these ended.

The children of a killed worker (SIGKILL, out of memory) live on: the core of a vLLM engine would keep its GPU
memory. So each of our workers starts a small guard, which records what the worker starts, waits until the
worker ends, and then ends what is left. The guard has its own session, so that a signal to the worker's
process group does not reach it.

The kernel's parent-death signal cannot do this: it is sent when the *thread* that started a process
ends, and engines are started by threads of a pool.

This file is also the guard's program (`python -I -S lifetime.py PID BORN`), so it imports nothing
but the standard library.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

LOOK_EVERY_S = 0.5
# Seconds for the rest to end by itself, which frees shared memory and temporary files.
GRACE_S = 3.0
# Seconds for a worker to end after its raylet. Most end at once; one may wait a minute for the GCS.
PARENT_GRACE_S = 5.0

_guarded: int | None = None


def bind_worker() -> None:
    """End everything that this process starts, now or later, with this process, and this process with the
    raylet that started it, if any. A second call does nothing.

    Raises:
        OSError, subprocess.SubprocessError: the guard cannot be started.
    """
    global _guarded
    if _guarded == os.getpid() or not sys.platform.startswith("linux"):
        return
    pid = os.getpid()
    program = [sys.executable, "-I", "-S", __file__, str(pid), str(start_ticks(pid))]
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    # It double-forks: Ray kills a worker's children with the worker.
    subprocess.run(
        program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        check=True,
        timeout=60,
    )
    _guarded = pid


def _guard(pid: int, born: int) -> None:
    """Wait for a process to end, then end what it started."""
    raylet = _parent(pid) if _is_raylet(_parent(pid)) else None
    orphan_since: float | None = None
    known: dict[int, int] = {}
    end = _end_of(pid)
    while start_ticks(pid) == born:
        known = _with_children({pid: born, **known})
        if raylet is not None and _parent(pid) != raylet:
            orphan_since = orphan_since or time.monotonic()
            if time.monotonic() > orphan_since + PARENT_GRACE_S:
                _kill(pid, born)
        if end is None:
            time.sleep(LOOK_EVERY_S)
        else:
            select.select([end], [], [], LOOK_EVERY_S)
    known.pop(pid, None)
    deadline = time.monotonic() + GRACE_S
    while known := _with_children(known):
        if time.monotonic() > deadline:
            for child, child_born in known.items():
                _kill(child, child_born)
        time.sleep(0.1)


def _end_of(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None without kernel support."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..; empty for no such process or a
    zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].decode("ascii").split()
    except (OSError, ValueError):
        return []
    return [] if fields[:1] in (["Z"], ["X"]) else fields


def start_ticks(pid: int) -> int:
    """The start of a process in ticks since boot, which with its id identifies it; 0 for none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _is_raylet(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().strip() == b"raylet"
    except OSError:
        return False


def _with_children(known: dict[int, int]) -> dict[int, int]:
    """The known processes (id: start) that still run, and all that they started."""
    found: dict[int, int] = {}
    waiting = [pid for pid, born in known.items() if start_ticks(pid) == born]
    while waiting:
        pid = waiting.pop()
        if pid not in found and (born := start_ticks(pid)):
            found[pid] = born
            waiting += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    own = os.getpid()
    if not os.path.exists(f"/proc/{own}/task/{own}/children"):  # not every kernel is built with it
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(int(name)) == pid]
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += _children_of_thread(f"/proc/{pid}/task/{thread}/children")
    except OSError:
        return []  # it has ended
    return children


def _children_of_thread(path: str) -> list[int]:
    try:
        with open(path, "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []  # the thread has ended


def _kill(pid: int, born: int) -> None:
    if start_ticks(pid) == born:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _become_guard() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    pid, born = map(int, sys.argv[1:])
    _guard(pid, born)


if __name__ == "__main__":
    _become_guard()
