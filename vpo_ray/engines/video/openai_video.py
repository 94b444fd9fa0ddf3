"""A video service as the video model: OpenAI's API of video jobs, as vLLM-Omni and others have it.

`POST {base_url}/videos` creates a job, `GET …/videos/{id}` says how far it is, `GET …/videos/{id}/content` is
the mp4. The image of a query is the file `input_reference` of the form. A job's id is kept in the video store
until its video is there, so that a run which was killed polls the job under way and does not pay for a second
one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote

from vpo_ray.engines.chat import Usage
from vpo_ray.engines.endpoint.account import Account, CostLimitReached
from vpo_ray.engines.endpoint.client import EndpointClient, EndpointError, File, RequestError
from vpo_ray.engines.endpoint.completion import parse_body
from vpo_ray.engines.endpoint.failures import about
from vpo_ray.engines.video import Prepared, RenderError, VideoModel
from vpo_ray.engines.video.engine import probe_video
from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.image_files import (
    ImageError,
    cover,
    data_uri,
    decode_image,
    encode_png,
    image_hash,
    media_type,
)
from vpo_ray.recipe import Render
from vpo_ray.records import content_id

log = logging.getLogger(__name__)

# Of the video store: the jobs under way.
FOLDER = "service_jobs"
# Seconds between two polls of a job: a tenth of its age, within these.
MIN_POLL_S, MAX_POLL_S = 1.0, 10.0
# 404s in a row before a job is lost: one replica of a service may not know another's job at once.
LOST_AFTER = 2
# Of a request: the file or object with the image.
_REFERENCE = "input_reference"
_SIZE = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")

# In lower case. Any other status is of a job under way.
_COMPLETED = frozenset({"completed", "complete", "succeeded", "success", "done", "finished", "ready"})
_FAILED = frozenset(
    {"failed", "failure", "error", "cancelled", "canceled", "expired", "rejected", "aborted", "timeout"}
)


@dataclass(frozen=True)
class ServiceJob:
    """A job that a service took.

    Attributes:
        id: the service's name of it.
        base_url: of that service; another one does not know the id.
        paid: it is completed, and in the account of a run.
    """

    id: str
    base_url: str | None
    paid: bool = False


# An image's name, `<sha256>.<kind>`, and its bytes.
_Image = tuple[str, bytes]


class _Lost(Exception):
    """The service does not know a job any more."""


def prepare(settings: Render, account: Account | None = None) -> Prepared:
    """The model of a recipe with `kind: openai`.

    Its identity is the model's name and `render.version`: who serves it does not change its videos.
    """
    identity = f"openai:{settings.model}" + (f"@{settings.version}" if settings.version else "")
    return Prepared(identity, partial(VideoService, settings, identity, account), concurrent=True)


class VideoService(VideoModel):
    """Renders by jobs of a service. Any number of threads may call `render` at once.

    Args:
        settings: the recipe's render section, with the video store.
        identity: of the model.
        account: what completed jobs are paid into. Its limit keeps jobs from being created: what is under
            way counts as paid for that.

    Raises:
        EndpointError: the variable with the key is not set.
    """

    def __init__(self, settings: Render, identity: str, account: Account | None = None) -> None:
        assert settings.store is not None
        self.settings, self._identity = settings, identity
        self._client = EndpointClient(settings.endpoint, settings.model, "render.endpoint", account)
        self._client.read_key()
        self._account = self._client.account
        self._jobs = Folder(settings.store) / FOLDER
        # What each video under way will still cost.
        self._coming: dict[str, float] = {}
        self._ended, self._gives_videos = asyncio.Event(), False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="video service", daemon=True).start()

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[bytes | Exception]:
        """One mp4 for every prompt, or why there is none; see `VideoModel.render`.

        Raises:
            EndpointError: the service refuses the key, does not know the model, or cannot be reached.
            CostLimitReached: the run may pay no more. The jobs of this replica have ended by then.
            StorageError: the ids of jobs cannot be read or written.
        """
        return self._results(prompts, seeds, [None] * len(prompts))

    def animate_files(
        self, files: Sequence[_Image], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[bytes | Exception]:
        """As `render`, each prompt with its image. It is sent as it is; where `endpoint.request` names a
        `size`, as a PNG of that: scaled to cover it, and the middle of what is over."""
        return self._results(prompts, seeds, files)

    def _results(
        self, prompts: Sequence[str], seeds: Sequence[int], images: Sequence[_Image | None]
    ) -> list[bytes | Exception]:
        return asyncio.run_coroutine_threadsafe(self._all(prompts, seeds, images), self._loop).result()

    def close(self) -> None:
        """End the connections; it renders nothing afterwards."""
        asyncio.run_coroutine_threadsafe(self._client.__aexit__(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _all(
        self, prompts: Sequence[str], seeds: Sequence[int], images: Sequence[_Image | None]
    ) -> list[bytes | Exception]:
        asked = zip(prompts, seeds, images, strict=True)
        made = await asyncio.gather(*(self._video(*one) for one in asked), return_exceptions=True)
        for result in made:
            if isinstance(result, BaseException) and not isinstance(result, RenderError | RequestError):
                raise result
        return made  # type: ignore[return-value]

    def stored(self, prompt: str, seed: int, image: str | None = None) -> None:
        """The video is in the store: its job is of no use any more."""
        self._drop(self._name(prompt, seed, image))

    def _name(self, prompt: str, seed: int, image: str | None) -> str:
        shown = [] if image is None else [image_hash(image)]
        asked = content_id("video job", self._identity, self.settings.endpoint.request, prompt, seed, *shown)
        return f"{asked}.json"

    async def _video(self, prompt: str, seed: int, image: _Image | None) -> bytes:
        name = self._name(prompt, seed, image[0] if image is not None else None)
        job = await asyncio.to_thread(self._find, name)
        kept = job is not None
        try:
            for _ in range(self.settings.endpoint.retries + 1):
                if job is None:
                    job = await self._created(name, prompt, seed, image)
                self._coming[name] = 0.0 if job.paid else self.settings.endpoint.cost
                try:
                    return await self._made(name, job, kept)
                except _Lost:
                    log.warning("render.endpoint: job %s is lost, another one is created", job.id)
                    job, kept = None, False
            raise RenderError(f"the service lost {self.settings.endpoint.retries + 1} jobs of this prompt")
        except TimeoutError:
            if kept:  # it had its time twice: the next try is another job
                await asyncio.to_thread(self._drop, name)
            limit = f"{self.settings.time_limit_s:g} s (render.time_limit_s)"
            raise RenderError(f"job {job.id if job else '?'} was not completed in {limit}") from None
        finally:
            self._coming.pop(name, None)
            self._ended.set()

    async def _created(self, name: str, prompt: str, seed: int, image: _Image | None) -> ServiceJob:
        endpoint = self.settings.endpoint
        fields, files = await self._fields(prompt, seed, image)
        self._coming.pop(name, None)
        try:
            self._account.check(sum(self._coming.values()))
            self._coming[name] = endpoint.cost
            body = await self._client.ask(
                "/videos",
                fields,
                form=endpoint.form,
                files=files,
                idempotency_key=uuid.uuid4().hex,
            )
        except CostLimitReached:
            # The run stops, and this process with it: what is under way will be paid, so it is kept first.
            self._coming.pop(name, None)
            while self._coming:
                self._ended.clear()
                await self._ended.wait()
            raise
        except RequestError as error:
            said = "refused the prompt" if error.filtered else "created no job"
            raise RenderError(f"the service {said}: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("id"), str | int):
            raise RenderError(f"the service answered {json.dumps(body)[:200]}, which names no job")
        job = ServiceJob(str(body["id"]), endpoint.base_url)
        await asyncio.to_thread(self._keep, name, job)
        return job

    async def _fields(
        self, prompt: str, seed: int, image: _Image | None
    ) -> tuple[dict[str, Any], Mapping[str, File] | None]:
        """The fields of a job, and the files of its form. JSON has an image as a `data:` URI."""
        fields: dict[str, Any] = {"prompt": prompt, "seed": seed}
        request = self.settings.endpoint.request
        if image is None or _REFERENCE in request:
            return fields, None
        try:
            name, data = await asyncio.to_thread(_sized, image, request.get("size"))
        except ImageError as error:
            raise RenderError(f"the image of the query cannot be sent: {error}") from error
        if self.settings.endpoint.form:
            kind = name.rpartition(".")[2]
            return fields, {_REFERENCE: (f"image.{kind}", data, media_type(name))}
        return {**fields, _REFERENCE: {"image_url": data_uri(name, data)}}, None

    async def _made(self, name: str, job: ServiceJob, kept: bool) -> bytes:
        """The mp4 of a job, paid once. Raises `_Lost`, and RenderError where there will be none.

        Args:
            kept: it is an earlier run's, whose video a service may keep for less time than the job.
        """
        path = f"/videos/{quote(job.id, safe='')}"
        async with asyncio.timeout(self.settings.time_limit_s):
            await self._completed(name, path)
        if not job.paid:
            await self._account.charge(Usage(cost=self.settings.endpoint.cost))
            self._coming[name] = 0.0
            await asyncio.to_thread(self._keep, name, replace(job, paid=True))
        for _ in range(self.settings.endpoint.retries + 1):
            try:
                data = await self._known(f"{path}/content")
                await asyncio.to_thread(probe_video, data)
                self._gives_videos = True
                return data
            except _Lost:
                if kept:
                    raise
                await self._known(path)  # else another job would be paid, for as little
                fault = "404"
            except ValueError as error:
                if isinstance(error, EndpointError):
                    raise
                fault = str(error)
        if fault == "404" and not self._gives_videos:
            told = f"job {job.id} is completed, and nothing is at {path}/content (404)"
            raise EndpointError(f"render.endpoint: {told}: the service has another API than OpenAI's", 404)
        await asyncio.to_thread(self._drop, name)
        raise RenderError(f"the content of job {job.id} is no whole video: {fault}")

    async def _completed(self, name: str, path: str) -> None:
        """Wait for the end of a job."""
        began = time.monotonic()
        while True:
            body = await self._state(path)
            status = str(body.get("status")).lower()
            if status in _COMPLETED:
                return
            if status in _FAILED:
                await asyncio.to_thread(self._drop, name)
                error = body.get("error") or status
                said = error.get("message") if isinstance(error, dict) else None
                text = str(said or error)[:500]
                refused = about(400, error, json.dumps(error)) == "input"
                raise RenderError(
                    f"the service refused the prompt: {text}" if refused else f"the job failed: {text}"
                )
            age = time.monotonic() - began
            await asyncio.sleep(min(max(age / 10, MIN_POLL_S), MAX_POLL_S))

    async def _state(self, path: str) -> dict[str, Any]:
        """What the service says of a job; nothing where it is out of order for the moment."""
        try:
            body = parse_body(await self._known(path))
        except ValueError as error:
            if isinstance(error, EndpointError):
                raise
            body = None
        except RequestError as error:
            if error.status is not None and error.status < 500 and error.status != 429:
                raise
            body = None
        return body if isinstance(body, dict) else {}

    async def _known(self, path: str) -> bytes:
        """What is at a path of a job. Raises `_Lost` where nothing is."""
        for _ in range(LOST_AFTER):
            try:
                return await self._client.get(path)
            except EndpointError as error:
                if error.status != 404:
                    raise
                await asyncio.sleep(MIN_POLL_S)
        raise _Lost

    def _find(self, name: str) -> ServiceJob | None:
        try:
            job = ServiceJob(**json.loads(self._jobs.read(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self._jobs.at(name)}: {error}") from error
        except (ValueError, TypeError):
            log.warning("%s names no job: another one is created", self._jobs.at(name))
            return None
        return job if job.base_url == self.settings.endpoint.base_url else None

    def _keep(self, name: str, job: ServiceJob) -> None:
        self._jobs.write_json(name, asdict(job))

    def _drop(self, name: str) -> None:
        self._jobs.delete(name)


def _sized(image: _Image, size: Any) -> _Image:
    """An image in the size that a service is asked for, as OpenAI's requires it. Raises ImageError."""
    found = _SIZE.fullmatch(str(size))
    if found is None:
        return image
    width, height = map(int, found.groups())
    return "image.png", encode_png(cover(decode_image(image[1]), width, height))
