"""Work in a thread beside other work: the next round's candidates while this round's policy is trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds that work gets to end after it was told to.
PATIENCE_S = 20.0


@contextmanager
def alongside(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Do `work` while the work within goes on; behind it, both have ended.

    Args:
        work: is given an event that says when to stop: the work within has failed, or was interrupted.

    Raises:
        what `work` raises, behind the work within.
    """
    stop, failures = threading.Event(), []

    def run() -> None:
        try:
            work(stop)
        except BaseException as error:  # noqa: BLE001 - raised behind the work within
            failures.append(error)

    # A daemon: what does not stop in time must not keep the process.
    thread = threading.Thread(target=run, name="alongside", daemon=True)
    thread.start()
    try:
        yield
        while thread.is_alive():
            thread.join(1.0)
    except BaseException:
        stop.set()
        thread.join(PATIENCE_S)
        raise
    if failures:
        raise failures[0]
