"""Videos that the rewards of a replica read one after another, decoded once for all of them.

Whoever scores a batch with several rewards says which frames each will ask for. The first of them that reads
a video decodes it, with what the others will ask for; `frames.read_frames` keeps it here until the batch is
done, and knows a video by the object that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Which frames, in ascending order, by the seconds of all frames and the frame rate.
Pick = Callable[[list[float], float], list[int]]


class SharedDecoding:
    """What is decoded so far. `picks` are those of all rewards."""

    def __init__(self, picks: Sequence[Pick]) -> None:
        self.picks = list(picks)
        # With the video itself: nothing else gets its id meanwhile.
        self._kept: dict[int, tuple[bytes | str, Any]] = {}

    def find(self, video: bytes | str) -> Any | None:
        kept = self._kept.get(id(video))
        return None if kept is None else kept[1]

    def keep(self, video: bytes | str, decoded: Any) -> None:
        self._kept[id(video)] = video, decoded


_current: ContextVar[SharedDecoding | None] = ContextVar("shared_decoding", default=None)


@contextmanager
def decoding_once(picks: Sequence[Pick]) -> Iterator[None]:
    """While in it, a video's frames for all of `picks` are decoded when the first of them is read."""
    token = _current.set(SharedDecoding(picks))
    try:
        yield
    finally:
        _current.reset(token)


def shared_decoding() -> SharedDecoding | None:
    """That of the `decoding_once` that this runs in."""
    return _current.get()
