"""Jobs that outlive the request and the replica that works on them: their files, and how they are run.

A job is a JSON file in a store, in `open/` until it ends, so that a restarted replica finds it and continues.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.policy import PolicyFailed, failure

logger = logging.getLogger("ray.serve")

# Tries of a call that kills its process.
TRIES = 2
# Seconds between tries to store a job that has ended: the first, doubled each time, and the most.
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
_LOCKS = 64


class JobState(BaseModel):
    """How far a job is; times in seconds since 1970."""

    id: str
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    created_at: int
    completed_at: int | None = None
    error: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")


Job = TypeVar("Job", bound=JobState)
T = TypeVar("T")


class JobFiles(Generic[Job]):
    """The files of jobs of one kind, in a folder of their own."""

    def __init__(self, folder: Folder, kind: type[Job]) -> None:
        self.folder, self.kind = folder, kind
        # A job's writes are one after the other, so that the last has all that is known of it.
        self._turns = [threading.Lock() for _ in range(_LOCKS)]

    def read(self, job_id: str) -> Job | None:
        """The job; None for an unknown id, or where the file does not hold this job. Raises StorageError."""
        if not job_id.isascii() or not job_id.isalnum():
            return None
        for name in (f"{job_id}.json", f"open/{job_id}.json", f"{job_id}.json"):  # it may move when it ends
            try:
                job = self.kind.model_validate_json(self.folder.read(name))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"cannot read job {job_id}: {error}") from error
            except ValueError as error:
                logger.error("%s is not a job and is ignored: %s", self.folder.at(name), _in_one_line(error))
                continue
            if job.id == job_id:
                return job
            logger.error("%s is not a job and is ignored: it has another id", self.folder.at(name))
        return None

    def write(self, job: Job) -> None:
        """Store a job as it is now. Raises StorageError."""
        with self._turns[hash(job.id) % _LOCKS]:
            is_over = job.is_over
            self.folder.write(
                f"{'' if is_over else 'open/'}{job.id}.json", job.model_dump_json(indent=2).encode()
            )
            if is_over:
                self.folder.delete(f"open/{job.id}.json")

    def enter(self, job: Job) -> None:
        """Store a job that begins, in place of one that ended under its id, which stays until then. Raises
        StorageError."""
        self.write(job)
        self.folder.delete(f"{job.id}.json")

    def unfinished(self) -> list[Job]:
        """Unfinished jobs of an earlier replica, oldest first. Unreadable files are logged and skipped."""
        left = []
        for name in (self.folder / "open").files(".json"):
            try:
                job = self.read(name.removesuffix(".json"))
            except StorageError as error:
                logger.error("%s", error)
                continue
            if job is not None and not job.is_over:
                left.append(job)
        return sorted(left, key=lambda job: job.created_at)


def _in_one_line(error: ValueError) -> str:
    """Why a file is not a job, without its content, which may be a user's."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    return "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()[:3])


class JobRunner(ABC, Generic[Job]):
    """Works on jobs, each in a task of its own.

    Attributes:
        jobs: their files.
        max_waiting: jobs at once; more are refused.
        tasks: of the jobs that are under way.
    """

    jobs: JobFiles[Job]
    max_waiting: int
    tasks: set[asyncio.Task[None]]

    @abstractmethod
    async def _make(self, job: Job) -> None:
        """Do the work, and fill the job's results. Raises ApiError with what its caller is told."""

    def _go_on(self) -> None:
        """Start what an earlier replica has left."""
        for job in self.jobs.unfinished():
            logger.info("job %s continues", job.id)
            self._start(job)

    def _start(self, job: Job, stored: asyncio.Future[None] | None = None) -> None:
        """Start a job; `stored` is resolved when a new one is in the store, or gets the error."""
        task = asyncio.get_running_loop().create_task(self._run(job, stored))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, job: Job, stored: asyncio.Future[None] | None = None) -> None:
        if stored is not None:
            try:
                await asyncio.to_thread(self.jobs.enter, job)
            except Exception as error:  # noqa: BLE001  the caller gets it
                stored.set_exception(error)
                return
            stored.set_result(None)
        try:
            await self._make(job)
        except ApiError as error:
            job.error = error.body()["error"]
        except PolicyFailed as error:
            job.error = failure(error).body()["error"]
        except (RayError, RayServeException) as error:
            logger.error("job %s failed: %s", job.id, type(error).__name__)
            job.error = ApiError(500, "the video model failed").body()["error"]
        except Exception as error:  # noqa: BLE001  a job always ends with a result or an error
            logger.error("job %s failed: %s", job.id, type(error).__name__)
            job.error = ApiError(500, "the job failed").body()["error"]
        job.status = "completed" if job.error is None else "failed"
        job.completed_at = int(time.time())
        await self._end(job)

    async def _end(self, job: Job) -> None:
        """Store a job that has ended, however long its store fails: its caller waits for it. It keeps its
        place meanwhile."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                await asyncio.to_thread(self.jobs.write, job)
                return
            except StorageError as error:
                logger.error("job %s has ended and waits for its store: %s", job.id, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_S)


async def tried(call: Callable[[], Awaitable[T]]) -> T:
    """The answer of a deployment; asked once more where its replica dies."""
    for left in range(TRIES - 1, -1, -1):
        try:
            return await call()
        except (RayError, RayServeException):
            if not left:
                raise
    raise AssertionError("unreachable")
