"""The status of a work that takes a while: one live view on a terminal; elsewhere a line now and then, when
something has changed, and none of what is over sooner. Either way the run's state has the same view, for
those who look from elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vpo_ray import terminal
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.run_state import NOTE_S, note
from vpo_ray.stream.live_logs import cluster_here
from vpo_ray.stream.status_text import status_line, status_table

logger = logging.getLogger(__name__)

# Seconds between two lines. Later ones come more rarely: a work of days has some hundred. One of a work in
# which nothing has moved since the last comes after so many times as long.
LINE_S = 30.0
STILL = 10
SPARSER = 8  # no more than this share of what has passed
LOOK_S = 1.0


class Status:
    """Shows views while the work within `with` goes on, and a last one at its end.

    Args:
        run: the run directory whose state gets the views.
        look: makes a view now (see `meter`); None, or any error, where it cannot.
    """

    _on_terminal = threading.Lock()  # one at a time has the terminal

    def __init__(self, run: RunDir, look: Callable[[], Row | None], line_s: float = LINE_S) -> None:
        self._run, self._look, self._line_s = run, look, line_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="status", daemon=True)

    def __enter__(self) -> Status:
        note(self._run, cluster=cluster_here())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _show(self) -> None:
        began = said_at = noted_at = time.monotonic()
        shown, moved = "", _moved(None)
        with ExitStack() as ending:
            update = self._live(ending)
            while True:
                last = self._stop.wait(LOOK_S)
                view, now = self._view(), time.monotonic()
                if view is not None:
                    if update is not None:
                        update(view)
                    if last or now - noted_at >= NOTE_S:
                        note(self._run, view=view)
                        noted_at = now
                    line = status_line(view)
                    wait = max(self._line_s, (now - began) / SPARSER)
                    due = now - said_at >= (wait if _moved(view) != moved else STILL * wait)
                    ends = last and (shown or now - began >= self._line_s)
                    if line != shown and (ends or (due and update is None)):
                        shown, said_at, moved = line, now, _moved(view)
                        logger.info("%s", line)
                if last:
                    return

    def _view(self) -> Row | None:
        try:
            return self._look()
        except Exception:  # a status that cannot be had must never stop the work
            logger.debug("no status this time", exc_info=True)
            return None

    def _live(self, ending: ExitStack) -> Callable[[Row], None] | None:
        """What updates the live view; None where there is no terminal to show it on."""
        stream = terminal.ours()
        if not stream.isatty() or not Status._on_terminal.acquire(blocking=False):
            return None
        ending.callback(Status._on_terminal.release)
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console: Any = Console(file=stream)
        live = Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        ending.enter_context(live)
        ending.enter_context(
            terminal.above(lambda text: console.print(Text(text), soft_wrap=True, highlight=False))
        )
        return lambda view: live.update(status_table(view), refresh=True)


def _moved(view: Row | None) -> tuple[int, ...]:
    """What grows as the work goes on: steps, or rows that are done or failed, of all stages."""
    if view is None or "steps" in view:
        return (view["step"] if view else 0,)
    return (sum(stage["done"] + stage["errors"] for stage in view["stages"]),)
