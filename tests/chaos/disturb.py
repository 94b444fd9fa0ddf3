"""Kills processes while a run is under way, each at the moment that its fault says."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos import processes
from chaos.faults import Fault
from chaos.nodes import Nodes

# How long a node that was lost stays away.
AWAY_S = 3.0
# No fault is later than this share of its process's life: other faults make it shorter.
LAST = 0.85
# One that comes back past the moment of its fault lives this long at most.
BACK_S = 10.0


@dataclass
class Hit:
    """A fault that happened.

    at: by time.monotonic(). known: processes of its kind at that time. back: when (by the clock of
    files) another one was there. lost_s: until that one's work was stored, or the run was over.
    """

    fault: Fault
    at: float
    known: frozenset[int]
    back: float | None = None
    lost_s: float | None = None


@dataclass
class Disturber:
    """Watches a run, and kills. Call `look` a few times a second.

    Args:
        faults: of one kind one after the other, of several at the same time.
        lives: seconds that a process of each kind lives in an undisturbed run.
        nodes: the cluster.
        folder: the run directory, where progress shows; None where there is none.
    """

    faults: Sequence[Fault]
    lives: dict[str, float]
    nodes: Nodes
    folder: Path | None = None
    hits: list[Hit] = field(default_factory=list)
    took_driver: bool = False

    def __post_init__(self) -> None:
        self.waiting = list(self.faults)
        self._due: dict[str, float] = {}
        self._absent: set[str] = set()
        self._orphans: list[psutil.Process] = []
        self._returns: dict[str, float] = {}
        self._gone: set[int] = set()
        self._seen: dict[str, tuple[float, float]] = {}

    def look(self, driver: int | None) -> None:
        """Kill what is due.

        Args:
            driver: its process id, while it runs.
        """
        now = time.monotonic()
        alive = self.nodes.workers()
        self._note_lives(alive, now)
        self._note_progress(alive, driver, now)
        for kind in [kind for kind, at in self._returns.items() if at <= now]:
            del self._returns[kind]
            self.nodes.replace(kind)
        for name in dict.fromkeys(fault.kind.name for fault in self.waiting):
            fault = next(fault for fault in self.waiting if fault.kind.name == name)
            victims = self._victims(fault, alive, driver)
            if not victims:
                self._absent.add(name)
                continue
            life = LAST * self.lives.get(fault.kind.process, 30.0)
            due = self._due.setdefault(name, now + fault.after * life)
            if name in self._absent:
                # It went, or had not come: not in the moment in which it is back.
                self._absent.remove(name)
                due = self._due[name] = max(due, now + fault.after * BACK_S)
            if now >= due:
                known = self._of_kind(fault, alive, driver)
                self._kill(fault, victims[fault.pick % len(victims)], known)

    def seen_lives(self) -> dict[str, float]:
        """Seconds from the first to the last look at which a process of each kind was there."""
        return {kind: last - first for kind, (first, last) in self._seen.items()}

    def finish(self) -> list[str]:
        """After the run: bring lost nodes back; titles of processes that a kill had left behind."""
        for kind in self._returns:
            self.nodes.replace(kind)
        self._returns.clear()
        now = time.monotonic()
        for hit in self.hits:
            hit.lost_s = now - hit.at if hit.lost_s is None else hit.lost_s
        return processes.left(self._orphans, patience_s=15)

    def _victims(self, fault: Fault, alive: list[psutil.Process], driver: int | None) -> list[int]:
        victims = sorted(self._of_kind(fault, alive, driver) - self._gone)
        if not fault.kind.node:
            return victims
        return [pid for pid in victims if self.nodes.of(pid) not in (None, *self._returns)]

    def _kill(self, fault: Fault, pid: int, known: frozenset[int]) -> None:
        self._due.pop(fault.kind.name, None)
        try:
            if fault.kind.node:
                node = self.nodes.of(pid)
                if node is None:
                    return
                self._orphans += self.nodes.lose(node)
                self._returns[node] = time.monotonic() + AWAY_S
            else:
                children = processes.kill(pid)
                if fault.kind.process != "driver":
                    self._orphans += children
        except psutil.NoSuchProcess:
            return  # it ended by itself in this moment: the fault waits for the next
        self._gone.add(pid)
        self.took_driver |= fault.kind.process == "driver"
        self.waiting.remove(fault)
        self.hits.append(Hit(fault, time.monotonic(), known))

    def _note_lives(self, alive: list[psutil.Process], now: float) -> None:
        for kind in processes.TITLES:
            if processes.find(kind, alive):
                first, _ = self._seen.get(kind, (now, now))
                self._seen[kind] = (first, now)

    def _note_progress(self, alive: list[psutil.Process], driver: int | None, now: float) -> None:
        if self.folder is None:
            return
        for hit in (hit for hit in self.hits if hit.lost_s is None):
            if hit.back is None:
                if self._of_kind(hit.fault, alive, driver) - hit.known:
                    hit.back = time.time()
                continue
            files = (path for part in hit.fault.kind.progress for path in self.folder.glob(part))
            if any(_modified(path) > hit.back for path in files):
                hit.lost_s = now - hit.at

    def _of_kind(self, fault: Fault, alive: list[psutil.Process], driver: int | None) -> frozenset[int]:
        if fault.kind.process == "driver":
            return frozenset() if driver is None else frozenset([driver])
        return frozenset(process.pid for process in processes.find(fault.kind.process, alive))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
