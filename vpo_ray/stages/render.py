"""Render: an aligned prompt becomes a video in the store.

Between judge and score. `Renderer` is plain Python that an actor pool calls with rows: it looks the
video up first, renders what is missing, and lets encoding and writing of one batch overlap with the
rendering of the next. All candidates of a query share one seed and the same settings, so that the
prompt is the only difference between their videos.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.results import one_for_each, said_by
from vpo_ray.engines.video import DeviceLostError, VideoModel, prepare
from vpo_ray.engines.video.engine import VideoInfo, encode, probe_video
from vpo_ray.files.folder import chunks
from vpo_ray.recipe import Recipe, Render, RenderGate
from vpo_ray.records import Row, failed, seed_of
from vpo_ray.stages.adaptive import is_renderable
from vpo_ray.stages.facts import Fact, of_model, of_plugin, of_versions
from vpo_ray.stages.gate import PromptGate, gate_facts
from vpo_ray.stages.spec import Making
from vpo_ray.stages.tally import Tally
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.video_leases import VideoLeases
from vpo_ray.storage.videos import VideoStore, key_parts, video_key

log = logging.getLogger(__name__)

STDERR = 2  # the file itself: a replaced sys.stderr may have none
WARM_UP_LIMIT_S = 3600  # compiling takes minutes
GRACE_S = 60.0  # what a render may take beyond twice its time limit before its process is ended

POLL_S = 1.0  # between two looks at a video that another renderer makes
_SHAPE = ("frames", "fps", "width", "height")

# A video's sidecar, or the reason why there is no video.
Made = dict[str, Any] | str


class _Job(NamedTuple):
    key: str
    prompt: str
    seed: int
    image: str | None


def wants(row: Row) -> bool:
    """Whether this row is to be rendered: its prompt was judged aligned and nothing failed so far."""
    return is_renderable(row) and row.get("error") is None


class Renderer:
    """Fills the video columns of rows.

    Several threads may call one instance: one of them renders while the others encode, write and
    look up, so a pool that lets two calls into an actor keeps its device busy with one-row blocks. Where
    a service renders, all of them do.
    Several instances may share a store: a video that one of them makes the others wait for.

    Args:
        settings: the recipe's render section.
        store_uri: the video store.
        seed: the recipe's seed.
        account: what videos of a service are paid from.
        gate: what prompts must reach to be rendered.
        images: URI of the images of queries, where they may have any.

    Attributes:
        rendered: videos made so far.
        hits: rows that needed no render of their own: their video was in the store, or an earlier
            row with the same prompt made it.

    Raises:
        VideoModelError: the model's folder is not there.
        StorageError: the model is a URI that cannot be read.
    """

    name = "render"
    wants = staticmethod(wants)

    def __init__(
        self,
        settings: Render,
        store_uri: str,
        seed: int,
        account: Account | None = None,
        gate: RenderGate | None = None,
        images: str | None = None,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.store = VideoStore(store_uri)
        self.images = None if images is None else ImageStore(images)
        self._prepared = prepare(settings.model_copy(update={"store": store_uri}), account)
        self.model = self._prepared.identity
        self.rendered = self.hits = 0
        self.warming: Callable[[], AbstractContextManager[None]] = nullcontext  # see actor_pools.Stage
        self._engine: VideoModel | None = None
        self._gate_settings = gate
        self._gate: PromptGate | None = None
        self._loading = threading.Lock()
        self._device = nullcontext() if self._prepared.concurrent else threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._writing: dict[str, Future[Made]] = {}
        self._leases = VideoLeases(self.store.folder)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows in their order; those that `wants` refuses are passed on as they are.

        Raises:
            StorageError: the store cannot be read or written, or an image is not there (the run stops and
                can be resumed).
            VideoModelError: the model or its settings cannot be used.
        """
        rows = self._gated(rows)
        jobs = {index: self._job(row) for index, row in enumerate(rows) if wants(row)}
        unique = {job.key: job for job in jobs.values()}
        outcomes: dict[str, Made] = {k: info for k in unique if (info := self._hit(k)) is not None}
        missing = [job for job in unique.values() if job.key not in outcomes]
        outcomes.update(self._render(missing))
        self.hits += len(jobs) - len(missing)
        filled = list(rows)
        for index, job in jobs.items():
            filled[index] = self._filled(rows[index], job, outcomes[job.key])
        return filled

    def _gated(self, rows: list[Row]) -> list[Row]:
        """The rows, with those that the gate stops marked."""
        wanted = [index for index, row in enumerate(rows) if wants(row)]
        if self._gate_settings is None or not wanted:
            return rows
        with self._loading:
            if self._gate is None:
                with self.warming():
                    self._gate = PromptGate(self._gate_settings)
        judged = list(rows)
        for index, row in zip(wanted, self._gate.judged([rows[i] for i in wanted]), strict=True):
            judged[index] = row
        return judged

    def _job(self, row: Row) -> _Job:
        seed = seed_of("video", self.seed, row["query_id"])
        image = row.get("image")
        key = video_key(self.settings, row["prompt"], seed, self.model, image)
        return _Job(key, row["prompt"], seed, image)

    def _filled(self, row: Row, job: _Job, outcome: Made) -> Row:
        if isinstance(outcome, str):
            return failed(row, self.name, outcome)
        video = {"video_key": job.key, "video_uri": self.store.uri(job.key), "video_seed": job.seed}
        facts = {name: outcome[name] for name in _SHAPE}
        # Videos of earlier versions do not tell.
        return {**row, **video, **facts, "text_cut": outcome.get("text_cut")}

    def _render(self, jobs: list[_Job]) -> Iterator[tuple[str, Made]]:
        """Render jobs batch by batch; a batch is written while the next one renders."""
        before: dict[str, Future[Made]] = {}
        started: set[str] = set()
        for batch in chunks(jobs, self.settings.batch_size):
            writing = self._start(batch)
            started |= writing.keys()
            # Waiting for the batch before bounds the frames in memory, and a full store stops the run.
            yield from ((key, future.result()) for key, future in before.items())
            before = writing
        yield from ((key, future.result()) for key, future in before.items())
        # Nothing of this call's is under way, so no two renderers wait for each other.
        elsewhere = [job for job in jobs if job.key not in started]
        while elsewhere:
            time.sleep(POLL_S * random.uniform(0.5, 1.5))
            made = {job.key: made for job in elsewhere if (made := self._known(job.key)) is not None}
            self.hits += len(made)
            free = (job for job in elsewhere if job.key not in made and not self._leases.taken(job.key))
            if batch := list(itertools.islice(free, self.settings.batch_size)):
                made |= self._start(batch)
            yield from ((key, future.result()) for key, future in made.items())
            elsewhere = [job for job in elsewhere if job.key not in made]

    def _start(self, batch: list[_Job]) -> dict[str, Future[Made]]:
        """Render a batch and hand it to the writer, without what another thread or renderer made
        meanwhile, and without what another renderer makes now: that is in none of the futures."""
        with self._device:
            futures = {job.key: known for job in batch if (known := self._known(job.key)) is not None}
            fresh: list[_Job] = []
            try:
                for job in batch:
                    if job.key in futures or not self._leases.take(job.key):
                        continue
                    fresh.append(job)
                    # The lease may have been free because the video was done.
                    if (known := self._known(job.key)) is not None:
                        futures[job.key] = known
                        self._leases.give_back(fresh.pop().key)
                videos, seconds = self._videos(fresh)
            except BaseException:
                for job in fresh:
                    self._leases.give_back(job.key)
                raise
            self.hits += len(futures)
            for job, video in zip(fresh, videos, strict=True):
                cut = self._engine.cut(job.prompt) if self._engine is not None else None
                future = self._writer.submit(self._write, job, video, seconds, cut)
                futures[job.key] = self._writing[job.key] = future
                future.add_done_callback(partial(self._forget, job.key))
            return futures

    def _hit(self, key: str) -> Made | None:
        """The sidecar of a video in the store that can be used as it is."""
        info = self.store.hit(key)
        return None if info is None or not info.keys() >= set(_SHAPE) else info

    def _known(self, key: str) -> Future[Made] | None:
        """A video that is being written or is in the store."""
        if (writing := self._writing.get(key)) is not None or (info := self._hit(key)) is None:
            return writing
        stored: Future[Made] = Future()
        stored.set_result(info)
        return stored

    def _forget(self, key: str, written: Future[Made]) -> None:
        self._writing.pop(key, None)

    def _videos(self, batch: list[_Job]) -> tuple[Sequence[np.ndarray | bytes | Exception], float]:
        """A video or an error for each job, and the seconds of the device that each took."""
        if not batch:
            return [], 0.0
        with self._loading:
            if self._engine is None:
                with self.warming():
                    engine = self._prepared.load()
                    with _guarded(WARM_UP_LIMIT_S):
                        engine.warm_up()
                    self._engine = engine
        start = time.perf_counter()
        # The engine ends a slow render between two steps. One that hangs within a step can only be
        # ended with its process; the pool then tries its rows elsewhere.
        limit_s = 2 * self.settings.time_limit_s * len(batch) + GRACE_S
        with nullcontext() if self._prepared.concurrent else _guarded(limit_s):
            videos = self._made(self._engine, batch)
        return videos, (time.perf_counter() - start) / len(batch)

    def _made(self, engine: VideoModel, batch: list[_Job]) -> list[np.ndarray | bytes | Exception]:
        made: dict[str, np.ndarray | bytes | Exception] = {}
        plain = [job for job in batch if job.image is None]
        shown = [(job, job.image) for job in batch if job.image is not None]
        if plain:
            videos = engine.render([job.prompt for job in plain], [job.seed for job in plain])
            videos = one_for_each(videos, len(plain), f"render: {type(engine).__name__}.render")
            made.update(zip((job.key for job in plain), videos, strict=True))
        if shown:
            assert self.images is not None, "rows with an image come with a place of images"
            files = [(name, self.images.read(name)) for _, name in shown]
            asked = [job.prompt for job, _ in shown], [job.seed for job, _ in shown]
            videos = engine.animate_files(files, *asked)
            videos = one_for_each(videos, len(shown), f"render: {type(engine).__name__}.animate_files")
            made.update(zip((job.key for job, _ in shown), videos, strict=True))
        return [made[job.key] for job in batch]

    def _write(
        self, job: _Job, video: np.ndarray | bytes | Exception, seconds: float, cut: int | None
    ) -> Made:
        try:
            return self._store(job, video, seconds, cut)
        finally:
            self._leases.give_back(job.key)

    def _store(
        self, job: _Job, video: np.ndarray | bytes | Exception, seconds: float, cut: int | None
    ) -> Made:
        if isinstance(video, Exception):
            reason = said_by(video)
            log.warning("video %s was not rendered: %s", job.key, reason)
            return reason
        if not isinstance(video, np.ndarray | bytes):
            kind = type(video).__name__
            return f"the video model returned what is no video: {kind}, no array of frames and no bytes"
        try:
            if isinstance(video, bytes):
                data, encoder, shape = video, None, probe_video(video)
            else:
                data, encoder = encode(video, self.settings.fps, self.settings.crf), f"av {version('av')}"
                frames, height, width, _ = video.shape
                shape = VideoInfo(frames, float(self.settings.fps), width + width % 2, height + height % 2)
        except ValueError as error:
            return f"the video model returned what is no video: {error}"
        sidecar = {
            **key_parts(self.settings, job.prompt, job.seed, self.model, job.image),
            "generator": self.settings.model or self.settings.kind,
            "encoder": encoder,
            **shape._asdict(),
            "seconds": round(seconds, 3),
            "text_cut": cut,
        }
        info = self.store.write(job.key, data, sidecar)
        self.rendered += 1
        assert self._engine is not None
        self._engine.stored(job.prompt, job.seed, job.image)
        return info


@contextmanager
def _guarded(limit_s: float) -> Iterator[None]:
    """End this process when the device hangs for longer than the limit, or is lost."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
    try:
        yield
    except DeviceLostError as error:
        # Every further render would fail here; a fresh replica takes these rows once more.
        log.critical("this replica ends, its device is lost: %s", error)
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()


def make(making: Making) -> Callable[[], Renderer]:
    recipe = making.recipe
    gate = None if recipe.gate is None else recipe.gate.located()
    settings = recipe.render.located()
    return partial(Renderer, settings, making.store, recipe.seed, making.account, gate, making.images)


def calls(recipe: Recipe) -> int:
    """While one video is encoded and stored, the next renders; a service makes as many as it is asked for."""
    render = recipe.render
    return -(-render.endpoint.concurrency // render.batch_size) if render.kind == "openai" else 2


def facts(recipe: Recipe) -> Iterator[Fact]:
    yield from gate_facts(recipe)
    if recipe.render.kind != "diffusers":
        yield from of_plugin("render", recipe.render)
        return
    yield from of_versions(
        "diffusers", "torch", "transformers", *(["torchao"] if recipe.render.quantize else [])
    )
    yield from of_model("render.model", recipe.render.model)
    if recipe.render.lora is not None:
        yield from of_model("render.lora.path", recipe.render.lora.path)


class RenderTally(Tally):
    columns = ("video_key", "text_cut")

    def __init__(self) -> None:
        self.cuts: dict[str, int | None] = {}

    def add(self, row: Row) -> None:
        self.cuts[row["video_key"]] = row["text_cut"]

    def result(self) -> dict[str, Any]:
        known = [cut for cut in self.cuts.values() if cut is not None]
        cut = {
            "videos": sum(tokens > 0 for tokens in known),
            "of": len(known),
            "most_tokens": max(known, default=0),
        }
        return {"videos": len(self.cuts), "text_cut": cut if known else None}


tally = RenderTally
