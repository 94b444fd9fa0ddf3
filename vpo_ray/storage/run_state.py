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
            _kept.pop(key, None)
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
                _note(root, run.shard, ended=time.time(), **end)


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
