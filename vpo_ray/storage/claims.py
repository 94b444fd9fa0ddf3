"""Claims: files with a heartbeat, in a folder that all machines reach, that say who works on something.

A process writes a claim, then lists the folder, and is the only one if there is no other claim: of two that
claim at once, at least the later one sees the other. This needs only a store that lists what was written, as
local disks, S3, GCS and Azure do; `pyarrow.fs` has no conditional write. A claim is rewritten every few
seconds while its owner lives. Others watch for changes by their own clock, so the machines' clocks need not
agree. A claim that does not change for long enough is deleted, or at once if its process was on this machine
and has ended.

`run_lock` has one for a run directory, `stages.render` one for a video that it makes.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.lifetime import start_ticks

logger = logging.getLogger(__name__)

BEAT_S = 5.0
STALE_S = 60.0
TRIES, RETRY_S = 4, 0.2

_NAME = re.compile(r"(.+)-[0-9a-f]{32}\.json")

# Folder and name of the claims that this process has.
_own: set[tuple[str, str]] = set()


@dataclass
class Seen:
    """Another's claim: its last content, since when, and whether it has changed before."""

    data: bytes
    at: float
    alive: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        return _facts(self.data)

    def __str__(self) -> str:
        known = {name: str(value)[:100] for name, value in self.facts.items()}
        names = ("user", "host", "pid", "since", "beat")
        text = "by {user} on {host}, process {pid}, since {since}, last heartbeat {beat}"
        return text.format(**{name: known.get(name, "?") for name in names})


class Claim:
    """This process's own claim.

    Args:
        claims: of the folder.
        subject: what is claimed.
    """

    def __init__(self, claims: Claims, subject: str) -> None:
        self._claims = claims
        self.name = f"{subject}-{uuid.uuid4().hex}.json"
        self._since, self._beats, self._pid = _now(), 0, os.getpid()

    def write(self, **facts: Any) -> None:
        """Write the claim; repeated as a heartbeat. Raises StorageError."""
        self._beats += 1
        _own.add((self._claims.folder.path, self.name))
        owner = {
            "host": socket.gethostname(),
            "pid": self._pid,
            "user": _user(),
            "since": self._since,
            "beat": _now(),
            "beats": self._beats,
            "process": _process(self._pid),
        }
        self._claims.folder.write_json(self.name, {**owner, **facts})

    def withdraw(self, stale_s: float = STALE_S) -> None:
        """Delete the claim. One that cannot be deleted becomes stale."""
        try:
            self._claims.folder.delete(self.name)
        except StorageError as error:
            logger.warning("a claim could not be deleted and becomes stale in %.0f s: %s", stale_s, error)
        # Not earlier: another thread of this process would take it for an orphan.
        _own.discard((self._claims.folder.path, self.name))


class Claims:
    """The claims in a folder. The object remembers what it has seen of them."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._seen: dict[str, Seen] = {}

    def names(self, subject: str | None = None) -> list[str]:
        """The claims for one thing, or all; sorted. Raises StorageError."""
        found = ((name, _NAME.fullmatch(name)) for name in self.folder.files())
        return [name for name, match in found if match and subject in (None, match[1])]

    def others(self, names: Iterable[str], own: str | None, stale_s: float) -> dict[str, Seen]:
        """The named claims whose owner is another and may be alive; those of dead owners are deleted.

        Raises:
            StorageError: a claim cannot be read or deleted.
        """
        now, names = time.monotonic(), list(names)
        others: dict[str, Seen] = {}
        for name in names:
            if name == own or (data := self.read(name)) is None:
                continue
            seen = self._seen.get(name)
            if seen is None or seen.data != data:
                seen = Seen(data, now, alive=seen is not None)
            if self._is_gone(name, seen.facts) or now - seen.at > stale_s:
                logger.warning("taking over from an owner that is gone: %s: %s", self.folder.at(name), seen)
                self.folder.delete(name)
            else:
                others[name] = seen
        kept = {name: seen for name, seen in self._seen.items() if now - seen.at <= stale_s}
        self._seen = {name: seen for name, seen in kept.items() if name not in names} | others
        return others

    def read(self, name: str) -> bytes | None:
        """A claim's content; None for a deleted one. Raises StorageError."""
        for again in reversed(range(TRIES)):
            try:
                return self.folder.read(name)
            except FileNotFoundError:
                return None
            except OSError as error:
                # A store may fail to read an object that is just being replaced or deleted.
                if not again:
                    raise StorageError(f"cannot read {self.folder.at(name)}: {error}") from error
            time.sleep(RETRY_S)
        raise AssertionError("unreachable")

    def _is_gone(self, name: str, facts: dict[str, Any]) -> bool:
        """Whether a claim's process was on this machine and has ended."""
        process, here, pid = facts.get("process"), _process(os.getpid()), facts.get("pid")
        if not isinstance(process, dict) or not isinstance(pid, int) or here is None:
            return False
        if process.get("machine") != here["machine"]:
            return False
        if process == here and pid == os.getpid():
            return (self.folder.path, name) not in _own  # one that could not be deleted
        return _process(pid) != process


def _facts(data: bytes) -> dict[str, Any]:
    """The facts in a claim; empty if it is not readable: then only its heartbeat counts."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        return str(os.getuid())


def _process(pid: int) -> dict[str, Any] | None:
    """The identity of a process on this machine and in this namespace of process ids. None if the system
    does not say, or there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
    started = start_ticks(pid)
    return {"machine": f"{boot} {namespace}", "started": started} if started else None
