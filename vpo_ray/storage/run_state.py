"""What a driver says of its work while it works: `meta/state.json` of the outermost run directory.

Whoever looks at the run from elsewhere reads it (`vpo status`, `vpo runs`), on any storage. Every driver of
a shard has a file of its own, `meta/state-3of8.json`. It says what the driver does and what the status shows;
what was made is in the tables and the ledger, and no result depends on it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.records import Row, Shard
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.tables import META

logger = logging.getLogger(__name__)

# Seconds between two writes of what changes all the time, and after which a driver's silence is told.
NOTE_S = 10.0
SILENT_S = 90.0
# Characters of an error that are kept.
LONGEST = 4000

_lock = threading.RLock()
_kept: dict[str, Row] = {}
_depth: dict[str, int] = {}


def _name(shard: Shard | None) -> str:
    return f"{META}/state-{shard.index}of{shard.of}.json" if shard else f"{META}/state.json"


def note(run: RunDir, **changes: Any) -> None:
    """Put facts into the run's state. A state that cannot be written stops no work."""
    root, place = run.root()
    _note(root, run.shard, place=place, **changes)


def _note(root: Folder, shard: Shard | None, **changes: Any) -> None:
    with _lock:
        key = f"{root.uri} {shard}"
        state = _kept.setdefault(key, {"host": socket.gethostname(), "pid": os.getpid()})
        state.update(changes, updated=time.time(), shard=str(shard) if shard else None)
        try:
            root.write_json(_name(shard), state)
        except (StorageError, OSError):
            logger.debug("the state of %s could not be written", root.uri, exc_info=True)


@contextmanager
def working(run: RunDir) -> Iterator[None]:
    """The state says `running` within, and then `done`, `stopped` (by a signal) or `failed` with the error.
    Rounds and evaluations within belong to the work around them."""
    root = run.root()[0]  # once: what says so may be written within
    key = f"{root.uri} {run.shard}"
    with _lock:
        _depth[key] = _depth.get(key, 0) + 1
        if _depth[key] == 1:
            _kept[key] = _resumed(root, run.shard)
            _note(root, run.shard, state="running", began=time.time(), error=None)
    end: Row = {"state": "done"}
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        said = (str(error) or type(error).__name__)[:LONGEST]
        end = {"state": "stopped"} if stopped else {"state": "failed", "error": said}
        raise
    finally:
        with _lock:
            _depth[key] -= 1
            if _depth[key] == 0:
                now = time.time()
                _note(root, run.shard, ended=now, worked_s=worked_s(_kept[key], now), **end)


def worked_s(state: Row, now: float) -> float:
    """Seconds that drivers have worked on the run until a moment, in all of the commands that were given."""
    before = float(state.get("worked_s", 0.0))
    return before + max(0.0, now - state["began"]) if state.get("state") == "running" else before


def _resumed(root: Folder, shard: Shard | None) -> Row:
    """A state that begins, with what earlier commands of the same run or shard leave: the time that they
    worked, and the last view of a work, which a command that has nothing to do does not replace."""
    try:
        before: Row = root.read_json(_name(shard)) if root.exists(_name(shard)) else {}
    except StorageError:  # damaged; it is written anew
        before = {}
    kept: Row = {name: before[name] for name in ("view", "cluster") if name in before}
    if "began" in before:
        # One that was killed worked until it said something last.
        kept["worked_s"] = worked_s(before, before["updated"])
    return {"host": socket.gethostname(), "pid": os.getpid(), **kept}


def states(run: Folder) -> list[Row]:
    """What the drivers of a run said last: the whole run's first, then the shards'. Empty for a run of an
    earlier version. `state` is `silent` where a running driver has said nothing for SILENT_S.

    Raises:
        StorageError: the folder cannot be listed, or a file is damaged.
    """
    names = [name for name in (run / META).files(".json") if name.startswith("state")]
    found = [(run / META).read_json(name) for name in sorted(names, key=lambda name: (len(name), name))]
    for state in found:
        if state.get("state") == "running" and time.time() - state["updated"] > SILENT_S:
            state["state"] = "silent"
    return found
