"""Checkpoints of a training run: every rank writes its shard, and reads it back after a restart.

DeepSpeed writes the shards (weights, optimizer), and Ray Train uploads and keeps them. A restart also
needs the step number and the curve, which are in `progress.json`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray.train
import torch.distributed as dist

from vpo_ray.files.folder import Folder
from vpo_ray.recipe import Evaluate, Training
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train.examples import TrainError
from vpo_ray.train.held_out import best, score
from vpo_ray.train.phase import Job, RankState

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
TAG = "state"
SCORE = "score"  # by which Ray Train keeps checkpoints, see held_out.score


def checkpoint_config(settings: Training) -> ray.train.CheckpointConfig:
    """What Ray Train keeps: the newest checkpoint, and with it the best ones where rows are held out, else
    the newest ones."""
    if not settings.evaluate.share:
        return ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints)
    return ray.train.CheckpointConfig(
        num_to_keep=settings.keep_checkpoints,
        checkpoint_score_attribute=SCORE,
        checkpoint_score_order="max",
    )


def checkpoint_due(done: int, job: Job) -> bool:
    """Whether a checkpoint follows step `done`; after the last step comes the export instead."""
    every = job.settings.save_steps
    return bool(every) and done % every == 0 and done < job.steps  # type: ignore[operator]


def save(worker: RankState, step: int, wait: bool) -> None:
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
    line = worker.curve[-1]
    ray.train.report(
        {"step": line["step"], SCORE: score(line, worker.curve, worker.job.settings.evaluate)},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{step:06}",
        checkpoint_upload_mode=modes.SYNC if wait else modes.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def refuse_other_workers(folder: Folder, workers: int) -> None:
    """Refuse to resume with another number of workers; called before workers start.

    Args:
        folder: of the run's checkpoints.

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
            f"run has {workers}, and a sharded checkpoint needs the same number. Set workers to "
            f"{progress['workers']}, or remove {folder.uri} to begin again"
        )


def resume(worker: RankState) -> int:
    """Load the newest checkpoint, if there is one. Returns the step to continue with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        progress = Folder(folder).read_json(PROGRESS)
        load_shard(worker, folder)
    worker.curve, worker.resumed_after = progress["curve"], progress["step"]
    log.info("%s continues after step %d", worker.job.phase, progress["step"])
    return int(progress["step"])


def load_best(worker: RankState) -> Row:
    """Load the weights of the best evaluation that still has a checkpoint, waiting for its upload.

    Returns:
        Its line of the curve: the last line, with the weights unchanged, where no other is better.
    """
    reported: Any = ray.train.get_all_reported_checkpoints()
    kept = {r.metrics["step"]: r.checkpoint for r in reported}
    chosen: list[Any] = [None]
    if worker.rank == 0:  # other ranks may see a different state of the storage
        found = [step for step, checkpoint in kept.items() if _is_there(checkpoint)]
        chosen = [choose_exported(worker.curve, found, worker.job.settings.evaluate)]
    dist.broadcast_object_list(chosen, src=0)
    line: Row = chosen[0]
    if line["step"] != worker.curve[-1]["step"]:
        with kept[line["step"]].as_directory() as folder:
            load_shard(worker, folder)
    return line


def choose_exported(curve: Sequence[Row], found: Collection[int], settings: Evaluate) -> Row:
    """The line of the best evaluation whose weights are available: those of the last step, or of a
    checkpoint at one of the steps `found`. The last line where nothing was evaluated."""
    last = curve[-1]
    top = best(curve, settings)
    line = best([x for x in curve if x["step"] in found or x is last], settings) or last
    if top is None:
        log.warning("no evaluation gave a finite %s: the last step is exported", settings.metric)
    elif line is not top:
        log.warning(
            "the best evaluation was after step %d, but its checkpoint is gone: step %d is exported",
            top["step"],
            line["step"],
        )
    return line


def _is_there(checkpoint: ray.train.Checkpoint) -> bool:
    path = f"{checkpoint.path}/{PROGRESS}"
    return bool(checkpoint.filesystem.get_file_info(path).type == pafs.FileType.File)


def load_shard(worker: RankState, folder: str) -> None:
    """Load this rank's shard from a local folder."""
    worker.engine.load_checkpoint(folder, tag=TAG, load_module_strict=worker.job.settings.lora is None)
