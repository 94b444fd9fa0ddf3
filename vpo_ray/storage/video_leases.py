"""Who makes which video now, so that a key is rendered once, whoever asks for it and wherever.

A renderer takes a lease before it renders: a claim in `leases/` of the store (see `claims`), which all
replicas, runs and endpoints share. A replica that dies leaves its lease to the next one.
"""

from __future__ import annotations

import logging
import threading

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.storage.claims import BEAT_S, STALE_S, Claim, Claims

logger = logging.getLogger(__name__)

FOLDER = "leases"


class VideoLeases:
    """The leases of one renderer.

    Args:
        store: the folder of the video store.
    """

    def __init__(self, store: Folder) -> None:
        self._claims = Claims(store / FOLDER)
        self._held: dict[str, Claim] = {}
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    def taken(self, key: str) -> bool:
        """Whether somebody else makes this video. Raises StorageError."""
        return bool(self._claims.others(self._claims.names(key), None, STALE_S))

    def take(self, key: str) -> bool:
        """Take the lease of a video; False where another has it, or asks for it at the same moment: then
        both have none, and try again. Raises StorageError."""
        if self.taken(key):
            return False
        claim = Claim(self._claims, key)
        try:
            claim.write()
            mine = not self._claims.others(self._claims.names(key), claim.name, STALE_S)
        except BaseException:
            claim.withdraw()
            raise
        if not mine:
            claim.withdraw()
            return False
        with self._changing:
            self._held[key] = claim
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
        return True

    def give_back(self, key: str) -> None:
        """Let the next one make it. A lease that is not held is fine."""
        with self._changing:
            claim = self._held.pop(key, None)
            if claim is not None:
                claim.withdraw()

    def _beat(self) -> None:
        tick = threading.Event()
        while not tick.wait(BEAT_S):
            with self._changing:
                if not self._held:
                    self._thread = None
                    return
                for claim in self._held.values():
                    try:
                        claim.write()
                    except StorageError as error:
                        logger.warning("no heartbeat of a lease: %s", error)
