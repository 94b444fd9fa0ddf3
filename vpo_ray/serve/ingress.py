"""The routes of the endpoint, in front of the engine's deployment.

A request passes the key and its limits and is validated before the engine sees it. `optimiser` decides on
the answer; here it gets its HTTP form.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from vpo_ray.files.folder import StorageError
from vpo_ray.lifetime import bind_worker
from vpo_ray.recipe import Serve
from vpo_ray.serve import playground
from vpo_ray.serve.answers import event
from vpo_ray.serve.chats import ChatDesk
from vpo_ray.serve.cors import Cors
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.feedback import FeedbackRequest, feedback_desk, noted
from vpo_ray.serve.forms import form_as_json
from vpo_ray.serve.http import Events, application, internal, parsed, read_body, refused
from vpo_ray.serve.images import (
    GivenImage,
    ImageReader,
    films_images,
    image_room,
    keep_image,
    takes_images,
)
from vpo_ray.serve.keys import ANYONE, Key, KeyRing
from vpo_ray.serve.limits import Admission, CallerLimits, Take
from vpo_ray.serve.optimiser import LATER, build_optimiser
from vpo_ray.serve.optimize_schema import (
    Asked,
    Optimization,
    OptimizationList,
    OptimizeRequest,
    engine_fields,
    parse_optimize,
)
from vpo_ray.serve.pairs import pairs_file
from vpo_ray.serve.policy import PolicyFailed, failure, overloaded
from vpo_ray.serve.refine_schema import Refinement
from vpo_ray.serve.refinements import RefineDesk
from vpo_ray.serve.request import ChatRequest, max_body_bytes, parse_request
from vpo_ray.serve.video_jobs import JobFolder, StoredJob, VideoJob, VideoRequest, parse_video
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

logger = logging.getLogger("ray.serve")
http = application()

# Seconds that a health check waits: without a free replica, a call would wait for one.
HEALTH_SECONDS = 5
# Seconds in which an answer proves health, so that a busy engine gets no extra request.
FRESH_SECONDS = 5


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that FastAPI does not parse."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        """The schema without references: FastAPI adds only models to the document that it parses itself."""
        if isinstance(value, list):
            return [inlined(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(definitions[value["$ref"].rpartition("/")[2]])
        return {key: inlined(item) for key, item in value.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}


# `serve.ingress` copies the routes when the class is created: what they call is defined before it.
def _id(request: Request) -> str:
    """The request's id, from Serve or the client; it is in the engine's log too."""
    return request.headers.get("x-request-id", "")[:128]


def _nothing(work: int) -> None:
    """For routes that are free."""


def _json(answer: Any) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


@serve.ingress(http)
class Ingress:
    """Replica of the HTTP side; light, so that it starts while the engine loads.

    Args:
        main, canary, settings, control: see `build_optimiser`.
        jobs: handle of the `VideoJobs` deployment where there are videos.
        refinements: handle of `RefinementJobs` where a request's effort may be videos.
    """

    def __init__(
        self,
        main: DeploymentHandle,
        canary: DeploymentHandle | None,
        jobs: DeploymentHandle | None,
        settings: Serve,
        control: tuple[str, ...],
        refinements: DeploymentHandle | None = None,
    ) -> None:
        bind_worker()
        self.settings, self.engine, self.jobs = settings, main, jobs
        self.optimiser = build_optimiser(main, canary, settings, control)
        self.policy, self.metrics = self.optimiser.policy, self.optimiser.policy.metrics
        self.store = settings.videos.store if settings.videos else None
        self.keys = KeyRing(settings.keys) if settings.keys else None
        self.limits = CallerLimits(
            settings.requests_per_minute,
            settings.concurrency,
            settings.ingress_replicas,
            least=settings.best_of.n if settings.best_of else 1,
        )
        self.feedback = feedback_desk(settings)
        self.chats, self.images = ChatDesk(self.optimiser, self.feedback), ImageReader()
        self.refining = RefineDesk(settings, refinements) if refinements is not None else None
        self.running = 0
        self.created = int(time.time())
        Cors.origins = settings.cors_origins

    async def __del__(self) -> None:
        """Serve calls it when a replica ends in order."""
        desk = getattr(self, "feedback", None)  # it may end before it has begun
        if desk is not None:
            await desk.close()

    @http.head("/health", include_in_schema=False)
    @http.get("/health")
    async def health(self) -> dict[str, str]:
        """200 once the engine answers."""
        if time.monotonic() - self.policy.answered > FRESH_SECONDS:
            try:
                await asyncio.wait_for(self.engine.check_health.remote(), HEALTH_SECONDS)
            except Exception as error:
                raise ApiError(503, "the engine does not answer", code="engine_unavailable") from error
        return {"status": "ok"}

    @http.get("/", include_in_schema=False)
    async def page(self) -> Response:
        return (
            playground.page(self.settings)
            if self.settings.playground
            else refused(ApiError(404, "no page here"))
        )

    @http.get("/playground/{name}", include_in_schema=False)
    async def asset(self, name: str) -> Response:
        found = playground.asset(name) if self.settings.playground else None
        return found or refused(ApiError(404, "no such file"))

    @http.get("/compare/{name:path}", include_in_schema=False)
    async def compare(self, request: Request, name: str) -> Response:
        found, folder = None, self.settings.compare
        if folder is not None:
            found = await asyncio.to_thread(pairs_file, folder, name, request.headers.get("range"))
        return found or refused(ApiError(404, "no such file"))

    @http.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The model that answers, as OpenAI's list of models."""

        async def answer(key: Key, take: Take) -> Response:
            return JSONResponse({"object": "list", "data": [self._card()]})

        return await self._admitted(request, "models", None, answer)

    @http.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> Response:
        """The same, by its name; 404 for another's."""

        async def answer(key: Key, take: Take) -> Response:
            if model != self.settings.model_name:
                message = f"the model {model[:100]!r} does not exist"
                raise ApiError(404, message, "model", "model_not_found")
            return JSONResponse(self._card())

        return await self._admitted(request, "models", None, answer)

    @http.post("/v1/chat/completions", openapi_extra=_documented(ChatRequest))
    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completion: the last user message is the query, and the answer its prompt."""

        async def answer(key: Key, take: Take) -> Response:
            room = image_room(takes_images(self.settings))
            body = await read_body(request, max_body_bytes(self.settings) + room)
            query, fields, attached = await parsed(parse_request, body, self.settings)
            take(self.optimiser.candidates(fields) if self.optimiser.needs_whole_prompts else fields["n"])
            image = await self.images.read(attached)
            self._note(query, key, image)
            return await self.chats.answer(query, fields, image, key, _id(request))

        return await self._admitted(request, "chat", "optimize", answer)

    @http.post(
        "/v1/optimize",
        openapi_extra=_documented(OptimizeRequest),
        response_model=Optimization | OptimizationList | Refinement,
    )
    async def optimize(self, request: Request) -> Response:
        """The prompt of a query or of several, with what was decided on the way; events where it streams."""

        async def answer(key: Key, take: Take) -> Response:
            room = image_room(takes_images(self.settings) or films_images(self.settings))
            limit = max_body_bytes(self.settings, self.settings.max_queries) + room
            body = await read_body(request, limit)
            asked = await parsed(parse_optimize, body, self.settings)
            if asked.budget is not None and self.refining is not None:
                # Its place in the key's limits depends on the job, which is named by the image too.
                image = await self.images.read(asked.images[0])
                self._note(asked.queries[0], key, image)
                return await self.refining.ask(asked, key, take, image)
            take(len(asked.queries) * self.optimiser.candidates(asked.fields, asked.wishes.effort))
            images = [await self.images.read(attached) for attached in asked.images]
            for query, image in zip(asked.queries, images, strict=True):
                self._note(query, key, image)
            if asked.stream:
                return Events(self._events(asked, images[0], key, _id(request)))
            if asked.single:
                return _json(await self._optimised(asked, 0, images[0], key, _id(request)))
            work = (
                self._entry(asked, index, image, key, f"{_id(request)}-{index}")
                for index, image in enumerate(images)
            )
            data = list(await asyncio.gather(*work))
            return _json(OptimizationList(data=data, model=self.settings.model_name))

        return await self._admitted(request, "optimize", "optimize", answer)

    @http.get("/v1/optimize/{job_id}", response_model=Refinement)
    async def refinement(self, request: Request, job_id: str) -> Response:
        """How far the job of a request with effort `videos` is."""

        async def answer(key: Key, take: Take) -> Response:
            if self.refining is None:
                raise ApiError(404, "this endpoint has no such jobs (serve.videos.refine)", code="no_videos")
            return _json(await self.refining.find(job_id, key))

        return await self._admitted(request, "optimize", None, answer)

    @http.post("/v1/feedback", status_code=204, openapi_extra=_documented(FeedbackRequest))
    async def say(self, request: Request) -> Response:
        """What a user says of an answer of `/v1/optimize`, by the answer's `id`."""

        async def answer(key: Key, take: Take) -> Response:
            if self.feedback is None:
                raise ApiError(404, "this endpoint takes no feedback (serve.feedback)", code="no_feedback")
            take(1)
            self.feedback.take(key, await read_body(request, max_body_bytes(self.settings)))
            return Response(status_code=204)

        return await self._admitted(request, "feedback", "optimize", answer)

    @http.post(
        "/v1/videos", status_code=202, openapi_extra=_documented(VideoRequest), response_model=VideoJob
    )
    async def make_video(self, request: Request) -> Response:
        """Render a query's prompt, or a prompt as it is: a job to ask for."""

        async def answer(key: Key, take: Take) -> Response:
            jobs, _ = self._videos()
            room = image_room(films_images(self.settings))
            body = await read_body(request, max_body_bytes(self.settings) + room)
            kind = request.headers.get("content-type", "")
            if kind.lower().startswith("multipart/form-data"):
                body = await form_as_json(body, kind)
            query, prompt, seed, attached = await parsed(parse_video, body, self.settings)
            fields = engine_fields(self.settings, 1, seed, None)
            take(self.optimiser.candidates(fields) if prompt is None else 1)
            image = await self.images.read(attached)
            self._note(query, key, image)
            name = await keep_image(self.settings, image)
            job = await jobs.submit.remote(query, seed, key.name, prompt, name)
            if job is None:
                raise overloaded(self.settings.overload_status)
            return Response(job, 202, media_type="application/json")

        return await self._admitted(request, "videos", "videos", answer)

    @http.get("/v1/videos/{job_id}", response_model=VideoJob)
    async def video(self, request: Request, job_id: str) -> Response:
        """The state of a job, and its video when there is one."""

        async def answer(key: Key, take: Take) -> Response:
            return _json((await self._job(job_id, key)).shown())

        return await self._admitted(request, "videos", None, answer)

    @http.get("/v1/videos/{job_id}/content", response_class=Response)
    async def video_content(self, request: Request, job_id: str) -> Response:
        """The mp4 of a job that is completed; 409 while it is not."""

        async def answer(key: Key, take: Take) -> Response:
            job = await self._job(job_id, key)
            if job.video is None:
                message = f"the job is {job.status}"
                raise ApiError(409, message, code="video_not_ready", headers={"Retry-After": "2"})
            try:
                data = await asyncio.to_thread(VideoStore(self._videos()[1]).read, job.video.key)
            except (VideoMissing, VideoDamaged):
                message = "the video is not in its store any more: ask for it again"
                raise ApiError(410, message, code="video_gone") from None
            return Response(data, media_type="video/mp4")

        return await self._admitted(request, "videos", None, answer)

    async def _job(self, job_id: str, key: Key) -> StoredJob:
        """A caller's own job. Raises ApiError (404) for one that is unknown or another's."""
        job = await asyncio.to_thread(JobFolder(self._videos()[1]).read, job_id)
        if job is None or job.owner != key.name:
            raise ApiError(404, f"there is no video {job_id[:100]!r}", code="video_not_found")
        return job

    def _videos(self) -> tuple[DeploymentHandle, str]:
        if self.jobs is None or self.store is None:
            raise ApiError(404, "this endpoint makes no videos (serve.videos)", code="no_videos")
        return self.jobs, self.store

    async def _admitted(
        self,
        request: Request,
        endpoint: str,
        scope: str | None,
        answer: Callable[[Key, Take], Awaitable[Response]],
    ) -> Response:
        """Answer an admitted caller, count the outcome, and release its place at the end."""
        began, hold, key = time.monotonic(), ExitStack(), ANYONE
        admission: Admission | None = None
        self._run(1)
        hold.callback(self._run, -1)
        try:
            key = self._caller(request, scope)
            if scope is not None:
                admission = hold.enter_context(self.limits.admit(key))
            response = await answer(key, admission.take if admission else _nothing)
        except ApiError as error:
            if admission and error.status != 429:
                admission.charge_invalid()
            response = refused(error)
        except PolicyFailed as error:
            response = refused(failure(error))
        except StorageError as error:
            logger.error("%s", getattr(error, "cause", error))  # of another replica
            message = "what this needs is in a store that fails; try again"
            response = refused(ApiError(503, message, code="storage_failed", headers=LATER))
        except Exception as error:  # noqa: BLE001  a client always gets an answer
            response = internal(error)
        except BaseException:
            hold.close()  # the client disconnected
            self.metrics.answered(endpoint, "left", key.name, time.monotonic() - began)
            raise
        status = str(response.status_code)

        def done() -> None:
            hold.close()
            self.metrics.answered(endpoint, status, key.name, time.monotonic() - began)

        if isinstance(response, Events):
            response.done = done
        else:
            done()
        return response

    def _caller(self, request: Request, scope: str | None) -> Key:
        if self.keys is None:
            return ANYONE
        key = self.keys.find(request.headers.get("authorization"))
        if scope is not None and scope not in key.scopes:
            message = f"this key may not use this route: its scopes are {', '.join(key.scopes)}"
            raise ApiError(403, message, code="scope_missing")
        return key

    async def _optimised(
        self, asked: Asked, index: int, image: GivenImage | None, key: Key, request_id: str
    ) -> Optimization:
        query, flags = asked.queries[index], asked.flags[index]
        result = await self.optimiser(query, asked.fields, request_id, flags, asked.wishes, image)
        self.metrics.optimised(result, key.name)
        return noted(self.feedback, key, query, result, asked.wishes.conditions, image)

    async def _entry(
        self, asked: Asked, index: int, image: GivenImage | None, key: Key, request_id: str
    ) -> Optimization | dict[str, Any]:
        """The answer to one of several queries, or its error."""
        try:
            return await self._optimised(asked, index, image, key, request_id)
        except ApiError as error:
            return error.body()
        except PolicyFailed as error:
            return failure(error).body()

    async def _events(
        self, asked: Asked, image: GivenImage | None, key: Key, request_id: str
    ) -> AsyncIterator[str]:
        """`prompt` events with the text as it is written, then one `result` or `error`."""
        try:
            # Several candidates, or ones that are checked or ranked first, are sent at the end.
            if self.optimiser.streams(asked.fields["n"], asked.wishes):
                query, flags = asked.queries[0], asked.flags[0]
                stream = self.optimiser.stream(query, asked.fields, request_id, flags, image)
                async with aclosing(stream):
                    async for part in stream:
                        if isinstance(part, str):
                            yield event("prompt", {"delta": part})
                        else:
                            result = part
                self.metrics.optimised(result, key.name)
                result = noted(self.feedback, key, query, result, image=image)
            else:
                result = await self._optimised(asked, 0, image, key, request_id)
            yield event("result", result.model_dump())
        except ApiError as error:
            yield event("error", error.body())
        except PolicyFailed as error:
            yield event("error", failure(error).body())
        except Exception as error:  # noqa: BLE001  a stream always ends with a result or an error
            yield event("error", json.loads(bytes(internal(error).body)))

    def _note(self, query: str, key: Key, image: GivenImage | None = None) -> None:
        """Log a query, as `log_queries` says; of its image the name alone."""
        shown = "" if image is None else f" of the image {image.name}"
        if self.settings.log_queries == "yes":
            logger.info("key %s asks %r%s", key.name, query, shown)
        elif self.settings.log_queries == "hash":
            digest = hashlib.sha256(query.encode()).hexdigest()
            logger.info("key %s asks sha256:%s%s", key.name, digest, shown)

    def _run(self, change: int) -> None:
        self.running += change
        self.metrics.running(self.running)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "vpo_ray",
        }
