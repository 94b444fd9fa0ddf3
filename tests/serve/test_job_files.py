"""Jobs while their store fails, is slow, or has lost what they made; and while the gate is out of order."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from services import Server
from starlette.requests import Request
from test_costs import Alone, Engine, Jobs
from test_refinements import settings_for
from test_wishes import Policy
from tiny_endpoint import SETTINGS

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.recipe import Serve
from vpo_ray.recipe.serve import Safety
from vpo_ray.serve import job_files
from vpo_ray.serve.optimiser import Optimiser
from vpo_ray.serve.refine_schema import Refinements, StoredRefinement, refinement_files
from vpo_ray.serve.refinements import RefinementJobs
from vpo_ray.serve.safety import Gate
from vpo_ray.serve.video_jobs import JobFolder, StoredJob, Video, VideoJobs


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_files, "FIRST_PAUSE_S", 0.01)


def optimiser(safety: Safety) -> Optimiser:
    return Optimiser(Policy(), Gate(safety), None, Serve())  # type: ignore[arg-type]


def filming(store: Path, safety: Safety | None = None) -> VideoJobs:
    """The owner of the jobs of videos, without a video model."""
    jobs = object.__new__(VideoJobs)
    jobs.settings, jobs.jobs, jobs.max_waiting, jobs.tasks = SETTINGS, JobFolder(str(store)), 3, set()
    jobs.optimiser = optimiser(safety or Safety())
    return jobs


def searching(folder: Path, safety: Safety | None = None) -> RefinementJobs:
    """The owner of the jobs of searches, without models."""
    settings = settings_for(folder, folder, None)
    assert settings.videos is not None
    jobs = object.__new__(RefinementJobs)
    jobs.settings, jobs.names = settings, Refinements(settings)
    jobs.jobs = refinement_files(settings.videos.store)
    jobs.max_waiting, jobs.tasks, jobs.live, jobs.entering = 3, set(), {}, asyncio.Lock()
    jobs.optimiser = optimiser(safety or Safety())
    return jobs


async def ended(jobs: Any) -> None:
    async with asyncio.timeout(20):
        while jobs.tasks:
            await asyncio.gather(*jobs.tasks)


def test_a_folder_that_cannot_be_asked_is_a_store_that_fails(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot look for"):
        Folder(tmp_path).exists("a" * 300)


def test_a_job_ends_once_its_store_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller would ask for ever."""
    jobs, write, failures = filming(tmp_path), Folder.write, iter(range(3))

    def full(folder: Folder, name: str, data: bytes) -> Any:
        if not name.startswith("open/") and next(failures, None) is not None:
            raise StorageError("no space left")
        return write(folder, name, data)

    async def make(job: StoredJob) -> None: ...

    async def run() -> str:
        monkeypatch.setattr(jobs, "_make", make)
        made = json.loads(await jobs.submit("a cat", 0, "web") or "")
        await ended(jobs)
        return str(made["id"])

    monkeypatch.setattr(Folder, "write", full)
    found = jobs.jobs.read(asyncio.run(run()))
    assert found is not None
    assert found.status == "completed"
    assert not list((tmp_path / "jobs/open").iterdir())


def failed(jobs: RefinementJobs) -> StoredRefinement:
    return StoredRefinement(
        id=jobs.names.name("a fox", [], 4),
        model="vpo",
        query="a fox",
        budget=4,
        created_at=1,
        status="failed",
        owners=["mine"],
        cost=2.5,
    )


def test_a_search_that_is_tried_again_is_not_lost_where_its_store_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = searching(tmp_path)
    before = failed(jobs)
    jobs.jobs.write(before)

    def full(folder: Folder, name: str, data: bytes) -> Any:
        raise StorageError("no space left")

    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(StorageError, match="no space"):
        asyncio.run(jobs.submit("a fox", [], 4, "mine"))
    assert jobs.jobs.read(before.id) == before


def test_who_asks_while_a_search_ends_may_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, write = searching(tmp_path), Folder.write
    reached, go = threading.Event(), threading.Event()

    def slow(folder: Folder, name: str, data: bytes) -> Any:
        if not name.startswith("open/") and not reached.is_set():
            reached.set()
            assert go.wait(20)
        return write(folder, name, data)

    async def make(job: StoredRefinement) -> None: ...

    async def run() -> str:
        monkeypatch.setattr(jobs, "_make", make)
        made = json.loads(await jobs.submit("a fox", [], 4, "mine") or "")
        assert await asyncio.to_thread(reached.wait, 20)
        other = asyncio.create_task(jobs.submit("a fox", [], 4, "other"))
        await asyncio.sleep(0.5)
        go.set()
        await other
        await ended(jobs)
        return str(made["id"])

    monkeypatch.setattr(Folder, "write", slow)
    found = jobs.jobs.read(asyncio.run(run()))
    assert found is not None
    assert (found.status, found.owners) == ("completed", ["mine", "other"])


def test_a_gate_that_does_not_answer_is_not_told_as_a_refusal(tmp_path: Path, outside: Any) -> None:
    silent: Server = outside(lambda path, request: (500, {"error": {"message": "down"}}))
    safety = Safety(query="refuse", moderation=silent.service())

    async def run() -> list[Any]:
        found: list[Any] = []
        for jobs, asked in (
            (filming(tmp_path, safety), ("a cat", 0, "web", "A cat.")),
            (searching(tmp_path, safety), ("a fox", [], 4, "web")),
        ):
            made = json.loads(await jobs.submit(*asked) or "")  # type: ignore[attr-defined]
            await ended(jobs)
            found.append(jobs.jobs.read(made["id"]))  # type: ignore[attr-defined]
        return found

    for job in asyncio.run(run()):
        assert (job.status, job.error["code"]) == ("failed", "safety_unavailable")
        assert job.error["type"] == "server_error"


@pytest.mark.parametrize(
    ("is_file", "status", "code"), [(True, 410, "video_gone"), (False, 503, "storage_failed")]
)
def test_what_the_store_has_not_is_no_fault_of_the_endpoint(
    tmp_path: Path, is_file: bool, status: int, code: str
) -> None:
    """A video that `vpo videos prune` has deleted, and a store that cannot be read."""
    video = Video(key="ab" * 16, frames=9, fps=8, width=64, height=64)
    jobs = JobFolder(str(tmp_path))
    if is_file:
        done = {"id": "video1", "model": "vpo", "query": "a cat", "seed": 0, "created_at": 1}
        jobs.write(StoredJob(**done, owner="anyone", status="completed", video=video))  # type: ignore[arg-type]
    else:
        (tmp_path / "jobs/video1.json").mkdir(parents=True)

    async def ask() -> Any:
        settings = Serve.model_validate({"videos": {"store": str(tmp_path)}})
        ingress = Alone(Engine(), None, Jobs(), settings, ())  # type: ignore[arg-type]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        return await ingress.video_content(Request(scope), "video1")

    reply = asyncio.run(ask())
    assert (reply.status_code, json.loads(reply.body)["error"]["code"]) == (status, code)
