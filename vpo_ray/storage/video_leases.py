"""Leases on videos that are being rendered, so that each key is rendered only once.

A renderer takes a lease before it renders: a claim in `leases/` of the store (see `claims`), which all
replicas, runs and endpoints share. The lease of a replica that dies passes to the next one.
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
        """Whether somebody else renders this video. Raises StorageError."""
        return bool(self._claims.others(self._claims.names(key), None, STALE_S))

    def take(self, key: str) -> bool:
        """Take the lease of a video. False if another has it, or claims it at the same moment: then neither
        gets it, and both try again. Raises StorageError."""
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
        """Give a lease back. It need not be held."""
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
