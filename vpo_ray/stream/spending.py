"""What a run has paid to endpoints: one account in its root run directory, for rounds and evaluations too.

Every stream of the pipeline has a file there, `account/<id>.json`, with its sums by stage. The file is
written anew before an answer that was paid for is used, so the account outlives any process, and a run that
is killed and goes on counts nothing twice.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.fs as pafs

from vpo_ray.engines.chat import Usage
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.records import Row
from vpo_ray.stages import spec
from vpo_ray.stages.chains import rows_of_stage
from vpo_ray.storage.run_dir import RunDir

ACCOUNT = "account"
LOOK_S = 10.0  # how often a stream looks up what others pay


@dataclass
class Charges:
    """Sums over paid answers: how many, their tokens, what was taken for them."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cost: float = 0.0

    def add(self, other: Charges) -> None:
        self.requests += other.requests
        self.prompt += other.prompt
        self.completion += other.completion
        self.cost += other.cost

    def add_row(self, row: Row, stage: str) -> None:
        """What the row says that it took at a stage; it does not say how many requests."""
        used = (row["usage"] or {}).get(stage) or {}
        self.add(Charges(0, *(used.get(name) or 0 for name in ("prompt", "completion", "cost"))))

    def shown(self) -> dict[str, Any]:
        """As a ledger has it."""
        tokens = {"prompt": self.prompt, "completion": self.completion}
        return {"tokens": tokens, "cost": round(self.cost, 6)}


class Book:
    """One stream's file of the account.

    Args:
        root: URI of the root run directory.
        place: of the run directory that pays, in it; "" for the root itself.
    """

    def __init__(self, root: str, place: str) -> None:
        self._folder, self._place = Folder(root), place
        self._name = f"{ACCOUNT}/{uuid.uuid4().hex}.json"
        self._stages: dict[str, Charges] = {}
        self._entered = self._written = 0
        self._writing = asyncio.Lock()
        self._others = self._others_before = self._paid_by_others()
        self._looked_at = time.monotonic()

    async def enter(self, stage: str, charge: Charges) -> None:
        """Returns once the charge is in the file. Charges that come meanwhile are written together.

        Raises:
            StorageError: the file cannot be written.
        """
        self._stages.setdefault(stage, Charges()).add(charge)
        self._entered += 1
        mine = self._entered
        async with self._writing:
            if self._written >= mine:
                return
            entered = self._entered
            sums = {name: asdict(charges) for name, charges in self._stages.items()}
            book = {"place": self._place, "stages": sums}
            await asyncio.to_thread(self._folder.write_json, self._name, book)
            self._written = entered

    async def paid_by_others(self) -> float:
        """What the run's other streams, those of other shards, have paid since this one began, as of the
        last LOOK_S.

        Raises:
            StorageError: the account cannot be read.
        """
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = time.monotonic()
            self._others = await asyncio.to_thread(self._paid_by_others)
        return self._others - self._others_before

    def _paid_by_others(self) -> float:
        places = _account(self._folder, self._name).values()
        return sum(charges.cost for stages in places for charges in stages.values())


@dataclass
class RunAccount(Account):
    """The account as replicas see it: what they pay is entered by the run's `Progress` actor.

    Args:
        progress: handle of that actor.
        stage: whose answers are paid.
    """

    progress: Any = None
    stage: str = ""

    async def charge(self, usage: Usage) -> None:
        entry = Charges(1, usage.prompt, usage.completion, usage.cost)
        self.spent = await self.progress.charge.remote(self.stage, entry)

    async def found(self, cost: float) -> None:
        """It is in the account since it was paid."""


def endpoint_cost(run: RunDir) -> float:
    """What the whole run cost at endpoints so far, in their prices' currency: every paid answer of all its
    stages, rounds and evaluations, whichever of their run directories is given."""
    return sum(sums.cost for stages in spent_at(run.root()[0]).values() for sums in stages.values())


def spent_at(root: RunDir, place: str | None = None) -> dict[str, dict[str, Charges]]:
    """Sums by the place of a run directory in the root one (of one place, or of all) and by stage.

    Rows say what they cost, too. That counts where the account says less: it is all there is of runs of
    earlier versions.

    Raises:
        StorageError: the account or a table cannot be read.
    """
    booked = _account(root)
    spent: dict[str, dict[str, Charges]] = {}
    for where in {*_places(root), *booked} if place is None else [place]:
        stages = spent[where] = booked.get(where, {})
        for stage, rows in _of_rows(RunDir(root.at(where)) if where else root).items():
            if rows.cost > stages.get(stage, Charges()).cost * (1 + 1e-9):
                stages[stage] = rows
    return spent


def _of_rows(run: RunDir) -> dict[str, Charges]:
    found = {stage.name: Charges() for stage in spec.stages() if stage.runs_on == "chat"}
    for stage, charges in found.items():
        for row in rows_of_stage(run, stage, ["usage"]):
            charges.add_row(row, stage)
    return found


def _account(root: Folder, but: str = "") -> dict[str, dict[str, Charges]]:
    """Sums by place and stage of all files of the account, but one."""
    folder = root / ACCOUNT
    found: dict[str, dict[str, Charges]] = {}
    for name in folder.files(".json"):
        if f"{ACCOUNT}/{name}" == but or name.startswith("."):  # a copy by macOS leaves such
            continue
        try:
            book = folder.read_json(name)
            for stage, sums in book["stages"].items():
                stages = found.setdefault(book["place"], {})
                stages.setdefault(stage, Charges()).add(Charges(**sums))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{folder.at(name)}, which says what was paid, cannot be read: {error}; mend or delete it"
            ) from error
    return found


def _places(run: RunDir) -> list[str]:
    """Where the run directories of a run are, in its own: "", its rounds and evaluations."""
    found = [""]
    for kind in ("rounds", "evaluation"):
        selector = pafs.FileSelector(f"{run.path}/{kind}", allow_not_found=True)
        try:
            infos = run.fs.get_file_info(selector)
        except OSError as error:
            raise StorageError(f"cannot list {run.at(kind)}: {error}") from error
        for info in infos:
            if info.type == pafs.FileType.Directory:
                place = f"{kind}/{info.base_name}"
                found += [f"{place}/{inner}".rstrip("/") for inner in _places(RunDir(run.at(place)))]
    return found
