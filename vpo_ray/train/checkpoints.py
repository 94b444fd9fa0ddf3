"""Checkpoints of a training run: every rank writes its shard, and reads it back after a restart.

DeepSpeed writes the shards (weights, optimizer), Ray Train uploads and keeps them; what else a
restart needs is the number of the step and the curve, in `progress.json`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from vpo_ray.recipe import Train
from vpo_ray.storage import Folder, RunDir
from vpo_ray.train.examples import TrainError

if TYPE_CHECKING:
    from vpo_ray.train.loop import Job, Worker

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
TAG = "state"


def config(settings: Train) -> ray.train.CheckpointConfig:
    """What Ray Train keeps: the newest checkpoint always, beside it the best where rows are held
    out, else the newest ones."""
    if not settings.evaluate.share:
        return ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints)
    return ray.train.CheckpointConfig(
        num_to_keep=settings.keep_checkpoints,
        checkpoint_score_attribute=f"eval_{settings.evaluate.metric}",
        checkpoint_score_order="min" if settings.evaluate.metric == "loss" else "max",
    )


def is_due(done: int, job: Job) -> bool:
    """Whether a checkpoint follows step `done`; behind the last step comes the export instead."""
    every = job.settings.save_steps
    return bool(every) and done % every == 0 and done < job.steps  # type: ignore[operator]


def save(worker: Worker, step: int, wait: bool) -> None:
    """Write this rank's shard and upload it, while training goes on unless `wait`. With LoRA only the
    adapter is written: the frozen weights are the base model's."""
    folder = Path(tempfile.mkdtemp(prefix="vpo-checkpoint-"))
    worker.engine.save_checkpoint(
        str(folder),
        tag=TAG,
        save_latest=False,
        exclude_frozen_parameters=worker.job.settings.lora is not None,
    )
    if worker.rank == 0:
        Folder(folder).write_json(PROGRESS, {"step": step, "workers": worker.workers, "curve": worker.curve})
        RunDir(worker.job.run_uri).write_metrics(worker.job.phase, worker.curve)
        if worker.trackers:
            worker.trackers.flush()
    modes = ray.train.CheckpointUploadMode
    ray.train.report(
        worker.curve[-1],
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{step:06}",
        checkpoint_upload_mode=modes.SYNC if wait else modes.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def refuse_other_workers(folder: Folder, workers: int) -> None:
    """Called before workers start, with the folder of a run's checkpoints.

    Raises:
        TrainError: the run stopped at a checkpoint that another number of workers wrote.
    """
    written = [name for name in folder.files(PROGRESS) if name.startswith("step-")]
    if not written:
        return
    progress = folder.read_json(max(written))
    if progress["workers"] != workers:
        raise TrainError(
            f"the checkpoint at step {progress['step']} was written by {progress['workers']} workers, this "
            f"run has {workers}; a sharded checkpoint needs the same number. Set workers to "
            f"{progress['workers']}, or remove {folder.uri} to begin again"
        )


def resume(worker: Worker) -> int:
    """Load the newest checkpoint, if there is one; the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        progress = Folder(folder).read_json(PROGRESS)
        load(worker, folder)
    worker.curve, worker.resumed_after = progress["curve"], progress["step"]
    log.info("%s goes on after step %d", worker.job.phase, progress["step"])
    return int(progress["step"])


def load_step(worker: Worker, step: int) -> None:
    """Load the weights of an earlier checkpoint of this run, waiting for its upload."""
    reported: Any = ray.train.get_all_reported_checkpoints()
    checkpoint = next(r.checkpoint for r in reported if r.metrics["step"] == step)
    with checkpoint.as_directory() as folder:
        load(worker, folder)


def load(worker: Worker, folder: str) -> None:
    """Load this rank's shard from a local folder."""
    worker.engine.load_checkpoint(folder, tag=TAG, load_module_strict=worker.job.settings.lora is None)
