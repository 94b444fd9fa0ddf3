"""One driver at a time writes to a run directory: a claim in `lock/`, with an owner and a heartbeat.

A driver writes a claim, `lock/<generation>-<id>.json`, and has the run if nobody else's is there (see
`claims`). One that has no heartbeat for STALE_S is taken over, and at once where its process was on this
machine and is gone. A driver that was frozen for so long finds its claim gone, or one of a later
generation: `check` raises before it destroys anything, and its heartbeat stops it.

The driver of a shard writes `lock/<generation>-3of8-<id>.json`. It excludes all others but those of other
shards of the same number, and it deletes and replaces nothing in the run directory.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.records import Shard
from vpo_ray.storage.claims import BEAT_S, STALE_S, Claim, Claims, Seen

logger = logging.getLogger(__name__)

FOLDER = "lock"
POLL_S = 0.5
_NAME = re.compile(r"\d{8}(?:-(\d+)of(\d+))?-[0-9a-f]{32}\.json")


class RunInUseError(RuntimeError):
    """Another driver has the run directory; the message says who, and until when."""

    exit_status = 3


class RunLostError(RuntimeError):
    """This driver had the run directory, and another has it now: nothing more may be written there."""

    stops_run = True  # see stream/stops.py


class RunLock:
    """The lock of one run directory. `driving` keeps one for each directory that this process has.

    Args:
        uri: of the run directory.
        shard: what this driver takes of it; the whole when unset.
    """

    def __init__(self, uri: str | Path, shard: Shard | None = None) -> None:
        self.run, self.shard = Folder(uri), shard
        self.claims = Claims(self.run / FOLDER)
        self.lost: RunLostError | None = None
        self.pid = os.getpid()
        self.depth = 0
        self._writing = threading.Lock()
        self._over = threading.Event()
        # Only there a signal's handler can stop the work.
        self._in_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the run directory or its shard; waits while the last owner may be dead.

        Raises:
            RunInUseError: its owner lives.
            StorageError: the folder cannot be written or listed.
        """
        generation = 1 + max((int(name[:8]) for name in self._names()), default=0)
        shard = f"-{self.shard.index}of{self.shard.of}" if self.shard else ""
        self._own = Claim(self.claims, f"{generation:08d}{shard}")
        seen: set[str] = set()
        try:
            self._own.write(state="waiting")
            beat = time.monotonic()
            while others := self.claims.others(self._names(), self._own.name, STALE_S):
                for name, other in others.items():
                    # Of two that wait, the first by name goes on, once the other has left.
                    if other.alive and (other.facts.get("state") == "held" or name < self._own.name):
                        raise RunInUseError(self._refusal(name, other))
                    if name not in seen:
                        seen.add(name)
                        logger.info(
                            "%s is locked: %s. Without a heartbeat it is taken over in %.0f s",
                            *(self.run.uri, other, STALE_S),
                        )
                time.sleep(POLL_S)
                if time.monotonic() - beat > BEAT_S:
                    self._own.write(state="waiting")
                    beat = time.monotonic()
            self._own.write(state="held")
            self._verify()
        except RunLostError as error:
            self._own.withdraw(STALE_S)
            raise RunInUseError(str(error)) from None
        except BaseException:
            self._own.withdraw(STALE_S)
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
            self._own.withdraw(STALE_S)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._writing:
                if self._over.is_set():
                    return
                try:
                    self._verify()
                    self._own.write(state="held")
                except RunLostError as error:
                    self.lost = error
                    break
                except (StorageError, OSError) as error:
                    logger.warning("no heartbeat in %s: %s", self.run.uri, error)
        else:
            return
        logger.error("%s", self.lost)
        if self._in_main and callable(signal.getsignal(signal.SIGTERM)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _names(self) -> list[str]:
        """The claims that exclude this driver's, and its own."""
        return [name for name in self.claims.names() if _NAME.fullmatch(name) and self._excludes(name)]

    def _excludes(self, name: str) -> bool:
        other = _shard_of(name)
        if self.shard is None or other is None:
            return True
        return other.of != self.shard.of or other.index == self.shard.index

    def _verify(self) -> None:
        names = self._names()
        if self._own.name not in names:
            raise RunLostError(f"{self.run.uri}: the lock of this driver is gone, so another may work there")
        for name in names:
            if name > self._own.name and (data := self.claims.read(name)) is not None:
                other = Seen(data, time.monotonic())
                if other.facts.get("state") == "held":
                    raise RunLostError(f"{self.run.uri} was taken over from this driver: {other}")

    def _refusal(self, name: str, other: Seen) -> str:
        shard = _shard_of(name)
        what = f"shard {shard} of {self.run.uri}" if shard else self.run.uri
        text = (
            f"{what} is in use: {other}. Stop that driver or wait for its end; one that dies "
            f"is taken over {STALE_S:.0f} s after its last heartbeat, on its own machine at once"
        )
        if shard and self.shard and shard.of != self.shard.of:
            text += f". Shards that run at one time are of one number: of {shard.of} here"
        return text


def _shard_of(name: str) -> Shard | None:
    """The shard that a claim is for, None for the whole run."""
    found = _NAME.fullmatch(name)
    try:
        return Shard(int(found[1]), int(found[2])) if found and found[1] else None
    except ValueError:
        return None


# By filesystem and path, as a URI may have options, and by shard.
_held: dict[tuple[str, str, Shard | None], RunLock] = {}
_changing = threading.RLock()


@contextmanager
def driving(uri: str | Path, shard: Shard | None = None) -> Iterator[None]:
    """Have a run directory, or a shard of it, to oneself for the work within; one process may do so again
    inside.

    Raises:
        RunInUseError: another driver has it.
        RunLostError: it was taken over while this process was frozen.
        StorageError: the folder cannot be written or listed.
    """
    folder = Folder(uri)
    place = folder.fs.type_name, folder.path, shard
    with _changing:
        lock = _held.get(place)
        if lock is None or lock.pid != os.getpid():
            lock = RunLock(uri, shard)
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
        RunLostError: this process had the run directory around the folder, and lost it.
        RunInUseError: this process has a shard of it only: drivers of other shards may use what is there.
        StorageError: that cannot be found out.
    """
    for lock in list(_held.values()):
        inside = f"{folder.path}/".startswith(f"{lock.run.path}/") and folder.fs.equals(lock.run.fs)
        if inside and lock.pid == os.getpid():
            lock.check()
            if lock.shard is not None:
                raise RunInUseError(f"{folder.uri}: a driver of shard {lock.shard} deletes nothing there")
