"""`/v1/videos`: a query in, a video out, as a job that outlives the request and its replica.

One replica of `VideoJobs` owns all jobs: it optimises the query, has the prompt rendered into the
content-addressed store, and scored if the recipe says so. Jobs are in `jobs/` of the store.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError, model_validator
from ray.serve.handle import DeploymentHandle

from vpo_ray.files.folder import Folder, join
from vpo_ray.lifetime import bind_worker
from vpo_ray.recipe import Render, Reward, Serve
from vpo_ray.records import query_id
from vpo_ray.serve.errors import ApiError, explained
from vpo_ray.serve.images import AttachedImage, check_film, digest_of, refuse_other_images, stored_image
from vpo_ray.serve.job_files import JobFiles, JobRunner, JobState, tried
from vpo_ray.serve.optimiser import build_optimiser, refusal
from vpo_ray.serve.optimize_schema import IMAGE, Image64, SafetyOutcome, engine_fields, separate
from vpo_ray.serve.request import RequestBody, Text, check_model, check_query, read_json


class VideoRequest(RequestBody):
    """A request for a video. OpenAI's field `prompt` may hold the query too. The seed is the video's, 0
    unless it is given.

    With both, `prompt` is rendered as it is: an answer's prompt, an edited one, or the query itself. Videos
    of one query and seed begin with the same noise. `image` is the query's picture, where videos are made
    from images.
    """

    query: Text | None = None
    prompt: Annotated[Text, Field(max_length=8000)] | None = None
    image: Annotated[Image64 | None, Field(description=IMAGE)] = None
    model: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _either(self) -> VideoRequest:
        if self.query is None and self.prompt is None:
            raise ValueError("give `query`")
        return self


class Video(BaseModel):
    """The result of a finished job."""

    key: str
    frames: int
    fps: float
    width: int
    height: int
    score: float | None = None
    dimensions: dict[str, float] | None = None


class VideoJob(JobState):
    """A job as its caller sees it."""

    object: Literal["video"] = "video"
    model: str
    query: str
    # SHA-256 and kind of the query's picture.
    image: str | None = None
    seed: int
    prompt: str | None = None
    safety: SafetyOutcome = SafetyOutcome()
    fallback: bool = False
    video: Video | None = None


class StoredJob(VideoJob):
    """A job as it is stored: with the name of the key that may see it, and whether its prompt was given."""

    owner: str
    as_is: bool = False

    def shown(self) -> VideoJob:
        return VideoJob(**self.model_dump(exclude={"owner", "as_is"}))


class AskedVideo(NamedTuple):
    """A validated request. Without a prompt to render as it is, the query is optimised."""

    query: str
    prompt: str | None
    seed: int
    image: AttachedImage | None


def parse_video(body: bytes, settings: Serve) -> AskedVideo:
    """Raises ApiError as `parse_optimize` does, and 400 for an image, or none, as the video model has it."""
    try:
        value = read_json(body)
        refuse_other_images(value)
        request = VideoRequest.model_validate(value)
    except ValidationError as error:
        raise explained(error, 422) from None
    check_model(request.model, settings)
    query, prompt = request.query, request.prompt
    if query is None:
        query, prompt = prompt or "", None
    check_query(query, settings, "query")
    if prompt is not None and not prompt.strip():
        raise ApiError(400, "the prompt is empty", "prompt", "empty_query")
    check_film(settings, request.image is not None)
    image = None if request.image is None else AttachedImage(request.image, "image")
    return AskedVideo(query, prompt, request.seed or 0, image)


class JobFolder(JobFiles[StoredJob]):
    """The jobs' files, in a video store."""

    def __init__(self, store: str) -> None:
        super().__init__(Folder(store) / "jobs", StoredJob)


class VideoRenderer:
    """A replica of the video model."""

    def __init__(self, settings: Render, store: str) -> None:
        from vpo_ray.stages.render import Renderer

        bind_worker()
        self.renderer = Renderer(settings, store, seed=0, images=join(store, "images"))

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return (await asyncio.to_thread(self.renderer, [row]))[0]


class VideoScorer:
    """A replica of the reward model, and of more of them."""

    def __init__(self, settings: Reward, store: str, more: Mapping[str, Reward] | None = None) -> None:
        from vpo_ray.stages.score import Scorer

        bind_worker()
        self.scorer = Scorer(settings, store, more, images=join(store, "images"))

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return (await asyncio.to_thread(self.scorer, [row]))[0]


class VideoJobs(JobRunner[StoredJob]):
    """Owns the jobs; one replica.

    Args:
        main, canary, settings, control: see `build_optimiser`.
        renderer, scorer: handles of the deployments above.
    """

    def __init__(
        self,
        main: DeploymentHandle,
        canary: DeploymentHandle | None,
        renderer: DeploymentHandle,
        scorer: DeploymentHandle | None,
        settings: Serve,
        control: tuple[str, ...],
    ) -> None:
        assert settings.videos is not None
        bind_worker()
        self.optimiser = build_optimiser(main, canary, settings, control)
        self.settings, self.renderer, self.scorer = settings, renderer, scorer
        self.jobs = JobFolder(settings.videos.store)
        self.max_waiting = settings.videos.max_waiting
        self.tasks = set()
        self._go_on()

    async def submit(
        self, query: str, seed: int, owner: str, prompt: str | None = None, image: str | None = None
    ) -> str | None:
        """Take a job and return it as JSON; None when too many are waiting. A given prompt is final.

        Args:
            image: the name of the query's image in `images.film_images`.
        """
        if len(self.tasks) >= self.max_waiting:
            return None
        job = StoredJob(
            id=f"video{uuid.uuid4().hex}",
            model=self.settings.model_name,
            query=query,
            image=image,
            seed=seed,
            prompt=prompt,
            created_at=int(time.time()),
            owner=owner,
            as_is=prompt is not None,
        )
        # It takes its place at once, and a caller that disconnects does not cancel a stored job.
        stored = asyncio.get_running_loop().create_future()
        self._start(job, stored)
        await asyncio.shield(stored)
        return job.shown().model_dump_json()

    async def _make(self, job: StoredJob) -> None:
        image = await stored_image(self.settings, job.image)
        # The video model's settings are the recipe's: flags in the query are dropped.
        if job.as_is:
            text, flags = separate(job.prompt or "")
            result = await self.optimiser.as_it_is(text, flags, image)
        else:
            fields = engine_fields(self.settings, 1, job.seed, None)
            query, flags = separate(job.query)
            result = await self.optimiser(query, fields, job.id, flags, image=image)
        job.prompt, job.safety, job.fallback = result.prompt, result.safety, result.fallback
        if result.safety.outcome == "refused":
            raise refusal(result.safety, None)
        job.status = "in_progress"
        await asyncio.to_thread(self.jobs.write, job)
        # The seed of a video follows from the query's id; here the caller's seed is part of the id.
        row: dict[str, Any] = {
            "query_id": f"{query_id(job.query, digest_of(image))}-{job.seed}",
            "query": job.query,
            "image": job.image,
            "prompt": job.prompt,
        }
        row = await tried(lambda: self.renderer.remote({**row, "verdict": "aligned", "error": None}))
        if row["error"] is None and self.scorer is not None:
            scorer, rendered = self.scorer, row
            row = await tried(lambda: scorer.remote(rendered))
        if row["error"] is not None:
            raise ApiError(500, f"{row['error_stage']}: {row['error']}")
        dimensions = {d["name"]: d["score"] for d in row.get("dimensions") or []} or None
        made = {name: row[name] for name in ("frames", "fps", "width", "height")}
        score = row.get("score")
        job.video = Video(key=row["video_key"], **made, score=score, dimensions=dimensions)
