"""One driver at a time writes to a run directory: a claim in `lock/`, with an owner and a heartbeat.

A driver writes a claim, `lock/<generation>-<id>.json`, then lists the folder, and has the run if
nobody else's claim is there: of two that claim at once, at least the later one sees the other. This
asks no more of a store than that it lists what was written, as local disks, S3, GCS and Azure do;
`pyarrow.fs` has no conditional write. The claim is written again every BEAT_S seconds. Whoever waits
for it watches whether it changes, by the clock of its own, so the machines' clocks need not agree.

A claim that does not change for STALE_S is taken over, and at once where its process was on this
machine and is gone. A driver that was frozen for so long finds its claim gone, or one of a later
generation: `check` tells it before it destroys anything, and its heartbeat stops it.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vpo_ray.folder import Folder, StorageError

logger = logging.getLogger(__name__)

FOLDER = "lock"
BEAT_S = 5.0
STALE_S = 60.0
POLL_S = 0.5

_CLAIM = re.compile(r"([0-9]{8})-[0-9a-f]{32}\.json")


class RunInUseError(RuntimeError):
    """Another driver has the run directory; the message says who, and until when."""

    exit_status = 3


class RunLostError(RuntimeError):
    """This driver had the run directory, and another has it now: nothing more may be written there."""

    stops_run = True  # see pools.STOP


@dataclass
class _Seen:
    """Another's claim as it was first read, and whether it has changed since."""

    data: bytes
    at: float
    alive: bool = False


class RunLock:
    """The lock of one run directory. `driving` keeps one for each directory that this process has.

    Args:
        uri: of the run directory.
    """

    def __init__(self, uri: str | Path) -> None:
        self.run = Folder(uri)
        self.folder = self.run / FOLDER
        self.lost: RunLostError | None = None
        self.pid = os.getpid()
        self.depth = 0
        self._name = ""
        self._state = "waiting"
        self._since = _now()
        self._beats = 0
        self._writing = threading.Lock()
        self._over = threading.Event()
        # Only there a signal's handler can stop the work.
        self._in_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the run directory; waits while the last owner may be dead.

        Raises:
            RunInUseError: its owner lives.
            StorageError: the folder cannot be written or listed.
        """
        generation = 1 + max((int(name[:8]) for name in self._claims()), default=0)
        self._name = f"{generation:08d}-{uuid.uuid4().hex}.json"
        seen: dict[str, _Seen] = {}
        try:
            self._write()
            beat = time.monotonic()
            while others := self._others(seen):
                for name, other in others.items():
                    # Of two that wait, the first by name goes on, once the other has left.
                    if other.alive and (_facts(other.data).get("state") == "held" or name < self._name):
                        raise RunInUseError(self._refusal(other.data))
                time.sleep(POLL_S)
                if time.monotonic() - beat > BEAT_S:
                    self._write()
                    beat = time.monotonic()
            self._state = "held"
            self._write()
            self._verify()
        except RunLostError as error:
            self._withdraw()
            raise RunInUseError(str(error)) from None
        except BaseException:
            self._withdraw()
            raise
        self._thread.start()

    def check(self) -> None:
        """Raises RunLostError when another driver has the run directory now, StorageError when that
        cannot be found out."""
        if self.lost is None:
            try:
                self._verify()
            except RunLostError as error:
                self.lost = error
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Let the next driver in."""
        self._over.set()
        with self._writing:
            self._withdraw()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._writing:
                if self._over.is_set():
                    return
                try:
                    self._verify()
                    self._write()
                except RunLostError as error:
                    self.lost = error
                    break
                except (StorageError, OSError) as error:
                    logger.warning("no heartbeat in %s: %s", self.folder.uri, error)
        else:
            return
        logger.error("%s", self.lost)
        if self._in_main and callable(signal.getsignal(signal.SIGTERM)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _claims(self) -> list[str]:
        return [name for name in self.folder.files() if _CLAIM.fullmatch(name)]

    def _others(self, seen: dict[str, _Seen]) -> dict[str, _Seen]:
        """The claims of others that may be alive; those of the dead are deleted."""
        now = time.monotonic()
        others: dict[str, _Seen] = {}
        for name in self._claims():
            if name == self._name or (data := self._read(name)) is None:
                continue
            first = name not in seen
            other = seen.setdefault(name, _Seen(data, now))
            if other.data != data:
                seen[name] = other = _Seen(data, now, alive=True)
            if _is_gone(_facts(data)) or now - other.at > STALE_S:
                logger.warning("taking %s over from a driver that is gone: %s", self.run.uri, _told(data))
                self.folder.delete(name)
                continue
            if first:
                logger.info(
                    "%s is locked: %s. Without a heartbeat it is taken over in %.0f s",
                    *(self.run.uri, _told(data), STALE_S),
                )
            others[name] = other
        return others

    def _verify(self) -> None:
        names = self._claims()
        if self._name not in names:
            raise RunLostError(f"{self.run.uri}: the lock of this driver is gone, so another may work there")
        for name in names:
            if name > self._name and (data := self._read(name)) is not None:
                facts = _facts(data)
                if facts.get("state") == "held":
                    raise RunLostError(f"{self.run.uri} was taken over from this driver: {_told(data)}")

    def _write(self) -> None:
        self._beats += 1
        self.folder.write_json(
            self._name,
            {
                "state": self._state,
                "host": socket.gethostname(),
                "pid": self.pid,
                "user": _user(),
                "since": self._since,
                "beat": _now(),
                "beats": self._beats,
                "process": _process(self.pid),
            },
        )

    def _read(self, name: str) -> bytes | None:
        try:
            return self.folder.read(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self.folder.at(name)}: {error}") from error

    def _withdraw(self) -> None:
        try:
            self.folder.delete(self._name)
        except StorageError as error:
            logger.warning("the lock is left behind, and is stale in %.0f s: %s", STALE_S, error)

    def _refusal(self, data: bytes) -> str:
        return (
            f"{self.run.uri} is in use: {_told(data)}. Stop that driver or wait for its end; one that dies "
            f"is taken over {STALE_S:.0f} s after its last heartbeat, on its own machine at once"
        )


_held: dict[tuple[str, str], RunLock] = {}  # by filesystem and path, as a URI may have options
_changing = threading.RLock()


@contextmanager
def driving(uri: str | Path) -> Iterator[None]:
    """Have a run directory to oneself for the work within; one process may do so again inside.

    Raises:
        RunInUseError: another driver has it.
        RunLostError: it was taken over while this process was frozen.
        StorageError: the folder cannot be written or listed.
    """
    folder = Folder(uri)
    place = folder.fs.type_name, folder.path
    with _changing:
        lock = _held.get(place)
        if lock is None or lock.pid != os.getpid():
            lock = RunLock(uri)
            lock.acquire()
            _held[place] = lock
        lock.depth += 1
    try:
        yield
    except BaseException as error:
        if lock.lost is not None and error is not lock.lost:
            raise lock.lost from error
        raise
    finally:
        with _changing:
            lock.depth -= 1
            if lock.depth == 0:
                del _held[place]
                lock.release()


def check(folder: Folder) -> None:
    """To be called before anything in a run directory is deleted or replaced.

    Raises:
        RunLostError: this process had the directory that the folder lies in, and lost it.
        StorageError: that cannot be found out.
    """
    for lock in list(_held.values()):
        inside = f"{folder.path}/".startswith(f"{lock.run.path}/") and folder.fs.equals(lock.run.fs)
        if inside and lock.pid == os.getpid():
            lock.check()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        return str(os.getuid())


def _facts(data: bytes) -> dict[str, Any]:
    """What a claim says; nothing where it cannot be read: then only its heartbeat counts."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _told(data: bytes) -> str:
    facts = {name: str(value)[:100] for name, value in _facts(data).items()}
    names = ("user", "host", "pid", "since", "beat")
    told = "by {user} on {host}, process {pid}, since {since}, last heartbeat {beat}"
    return told.format(**{name: facts.get(name, "?") for name in names})


def _process(pid: int) -> dict[str, Any] | None:
    """What tells a process from any other, on this machine and in this namespace of process ids: None
    where the system does not say, or there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        # Its name, which may hold anything, is in parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else {"machine": f"{boot} {namespace}", "started": started}


def _is_gone(facts: dict[str, Any]) -> bool:
    """Whether a claim's process was on this machine and has ended."""
    process, own = facts.get("process"), _process(os.getpid())
    if not isinstance(process, dict) or own is None or process.get("machine") != own["machine"]:
        return False
    pid = facts.get("pid")
    # A claim of this very process is one that it could not take back.
    return isinstance(pid, int) and (pid == os.getpid() or _process(pid) != process)
