"""Render: an aligned prompt becomes a video in the store.

Between judge and score. `Renderer` is plain Python that an actor pool calls with rows: it looks the
video up first, renders what is missing, and lets encoding and writing of one batch overlap with the
rendering of the next. All candidates of a query share one seed and the same settings, so that the
prompt is the only difference between their videos.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from vpo_ray.engines.video import VideoEngine, encode, model_identity
from vpo_ray.recipe import Render
from vpo_ray.records import Row, failed, seed_of
from vpo_ray.videos import VideoStore, key_parts, video_key

log = logging.getLogger(__name__)


class _Job(NamedTuple):
    key: str
    prompt: str
    seed: int


class _Outcome(NamedTuple):
    """The sidecar of a video, or why there is none; and the seconds spent on it (None for a hit)."""

    info: dict[str, Any] | str
    seconds: float | None


def wants(row: Row) -> bool:
    """Whether this row is to be rendered: its prompt was judged aligned and nothing failed so far."""
    return row.get("verdict") == "aligned" and row.get("prompt") is not None and row.get("error") is None


class Renderer:
    """Fills the video columns of rows. Threads may call one instance: one renders at a time, while
    the others encode, write and look up.

    Args:
        settings: the recipe's render section.
        store_uri: the video store.
        seed: the recipe's seed.

    Attributes:
        rendered: videos made so far.
        hits: rows that found their video in the store, or shared one with an earlier row.

    Raises:
        VideoModelError: the model's folder is not there.
    """

    def __init__(self, settings: Render, store_uri: str, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.store = VideoStore(store_uri)
        self.model = model_identity(settings.model, settings.revision)
        self.rendered = self.hits = 0
        self._engine: VideoEngine | None = None
        self._device = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows in their order; those that `wants` refuses are passed on as they are.

        Raises:
            StorageError: the store cannot be read or written (the run stops and can be resumed).
            VideoModelError: the model or its settings cannot be used.
        """
        jobs = {index: self._job(row) for index, row in enumerate(rows) if wants(row)}
        outcomes: dict[str, _Outcome] = {}
        missing: dict[str, _Job] = {}
        for job in {job.key: job for job in jobs.values()}.values():
            info = self.store.hit(job.key)
            if info is None:
                missing[job.key] = job
            else:
                outcomes[job.key] = _Outcome(info, None)
        outcomes.update(self._render(list(missing.values())))
        self.hits += len(jobs) - len(missing)
        done = list(rows)
        for index, job in jobs.items():
            done[index] = self._filled(rows[index], job, outcomes[job.key])
            outcomes[job.key] = outcomes[job.key]._replace(seconds=None)  # a twin row cost nothing
        return done

    def _job(self, row: Row) -> _Job:
        seed = seed_of("video", self.seed, row["query_id"])
        return _Job(video_key(self.settings, row["prompt"], seed, self.model), row["prompt"], seed)

    def _filled(self, row: Row, job: _Job, outcome: _Outcome) -> Row:
        if outcome.seconds is not None:
            row = {**row, "seconds": {**(row.get("seconds") or {}), "render": outcome.seconds}}
        if isinstance(outcome.info, str):
            return failed(row, "render", outcome.info)
        shape = {name: outcome.info[name] for name in ("frames", "fps", "width", "height")}
        video = {"video_key": job.key, "video_uri": self.store.uri(job.key), "video_seed": job.seed}
        return {**row, **video, **shape}

    def _render(self, jobs: list[_Job]) -> Iterator[tuple[str, _Outcome]]:
        """Render jobs batch by batch; a batch is written while the next one renders."""
        writing: list[tuple[str, Future[_Outcome]]] = []
        for start in range(0, len(jobs), self.settings.batch_size):
            batch = jobs[start : start + self.settings.batch_size]
            videos, seconds = self._frames(batch)
            # Waiting for the batch before bounds the frames in memory and stops a run whose store is full.
            yield from ((key, write.result()) for key, write in writing)
            writing = [
                (job.key, self._writer.submit(self._write, job, video, seconds))
                for job, video in zip(batch, videos, strict=True)
            ]
        yield from ((key, write.result()) for key, write in writing)

    def _frames(self, batch: list[_Job]) -> tuple[list[np.ndarray | Exception], float]:
        """Frames or an error for each job, and the seconds that each took of the device."""
        with self._device:
            if self._engine is None:
                self._engine = VideoEngine(self.settings)
            start = time.perf_counter()
            videos = self._engine.render([job.prompt for job in batch], [job.seed for job in batch])
            return videos, (time.perf_counter() - start) / len(batch)

    def _write(self, job: _Job, video: np.ndarray | Exception, seconds: float) -> _Outcome:
        if isinstance(video, Exception):
            log.warning("video %s was not rendered: %s", job.key, video)
            return _Outcome(str(video), seconds)
        data = encode(video, self.settings.fps, self.settings.crf)
        frames, height, width, _ = video.shape
        sidecar = {
            **key_parts(self.settings, job.prompt, job.seed, self.model),
            "generator": self.settings.model,
            "encoder": f"av {version('av')}",
            "frames": frames,
            "fps": float(self.settings.fps),
            "width": width + width % 2,
            "height": height + height % 2,
            "seconds": round(seconds, 3),
        }
        info = self.store.write(job.key, data, sidecar)
        self.rendered += 1
        return _Outcome(info, seconds)
