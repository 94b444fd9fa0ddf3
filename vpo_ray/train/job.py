"""The driver's side of a phase: check the data, start the workers, return what they made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow.fs as pafs

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.folder import Folder, join
from vpo_ray.prompts.conditions import asked_of
from vpo_ray.recipe import result_keys
from vpo_ray.records import GROUP, PAIR, SFT, Row, content_id
from vpo_ray.storage import run_lock
from vpo_ray.storage.model_cache import fetch
from vpo_ray.storage.run_dir import ALSO, RunDir
from vpo_ray.storage.tables import Table
from vpo_ray.stream.last_words import with_causes
from vpo_ray.stream.meter import StepMeter
from vpo_ray.stream.placement import require, watched, worker_shapes
from vpo_ray.stream.progress import Steps, beside_driver
from vpo_ray.stream.status import Status
from vpo_ray.train.examples import COLUMNS, TrainError, end_of_turn, row_id, tokenise
from vpo_ray.train.held_out import hold_out
from vpo_ray.train.images import ImagePrompts
from vpo_ray.train.model_files import former_identity, identity, marker, refuse_adapter
from vpo_ray.train.phase import Job, PhaseSpec
from vpo_ray.train.track import check_trackers
from vpo_ray.versions import code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A trained policy.

    out: its folder. steps: optimizer steps. metrics: of the exported step. rows: trained on.
    dropped: rows by reason. trained: False when it existed already. warnings: signs of a degenerate policy.
    """

    out: str
    steps: int
    metrics: dict[str, float]
    rows: int
    dropped: dict[str, int]
    trained: bool
    warnings: tuple[str, ...] = ()


def train(spec: PhaseSpec, rows: Iterable[Row] | str) -> TrainResult:
    """Train the policy on the running Ray cluster and leave a Hugging Face folder at `spec.out`.

    Repeated after a kill, it continues from the last checkpoint (`settings.save_steps`); repeated after it
    finished, it returns at once.

    Args:
        rows: of records.SFT, PAIR or GROUP, as the phase needs, or the path of their table.

    Raises:
        PlacementError: the cluster has no room for the workers.
        TrainError: no usable row, a conflict with the deepspeed section, a tracker that is not
            installed, a model that cannot be trained or exported, a loss that is not finite.
        PromptError: the tokenizer has no chat template.
        StorageError: an image of a row is not there, or damaged.
    """
    from vpo_ray.train.rehearsal import rehearse
    from vpo_ray.train.zero import deepspeed_config

    spec = replace(spec, out=Folder(spec.out).uri, run_uri=Folder(spec.run_uri).uri)
    phase, settings = spec.phase, spec.settings
    if isinstance(rows, str):
        rows = Table(
            rows, {"sft": SFT, "dpo": PAIR, "rl": GROUP}[phase], COLUMNS[phase][0], ALSO.get(phase, ())
        ).rows()
    identity_columns = [COLUMNS[phase][0], *ALSO.get(phase, ())]
    rows = sorted(rows, key=lambda row: [str(row.get(name)) for name in identity_columns])
    deepspeed_config(settings, settings.workers)
    check_trackers(settings.track)
    for name in filter(None, (spec.model, spec.reference, spec.sampler)):
        refuse_adapter(name)
    id, former = job_id(spec, rows), job_id(spec, rows, former_identity)
    done = marker(spec.out)
    if done is not None and done["job"] in (id, former):
        log.debug("%s is already trained: %s", phase, spec.out)
        _discard(spec.kept_of(done["job"]))  # where the driver was killed between its end and this
        return _result(spec.out, done, trained=False)
    if spec.kept_of(former).files("progress.json"):
        id = former
    job = _prepare(spec, rows, id)
    rehearse(job)
    _fit(job)
    done = marker(spec.out)
    if done is None or done["job"] != id:
        raise TrainError(
            f"{phase}: the workers finished but {spec.out} is not complete; is it on shared storage?"
        )
    result = _result(spec.out, done, trained=True)
    for text in result.warnings:
        log.warning("%s: %s", phase, text)
    return result


def job_id(spec: PhaseSpec, rows: list[Row], identify: Callable[[str, str | None], str] = identity) -> str:
    """The identity of everything that determines the trained weights.

    Args:
        identify: of a model and its revision; `former_identity` gives the id of earlier versions.
    """
    key, columns = COLUMNS[spec.phase]
    return content_id(
        "train",
        spec.phase,
        spec.fingerprint,
        result_keys(spec.settings.model_dump(mode="json", exclude_defaults=True)),
        identify(spec.model, spec.revision),
        *([identify(spec.reference, spec.revision)] if spec.reference else []),
        *([["sampler", identify(spec.sampler, spec.revision)]] if spec.sampler else []),
        spec.task_prompt,
        spec.seed,
        [[row.get(name) for name in (key, "query", *columns)] for row in rows],
        *([[asked_of(row) for row in rows]] if any(row.get("conditions") for row in rows) else []),
        *([["images", images, dict(spec.image_arguments)]] if any(images := _shown(spec, rows)) else []),
    )


def _shown(spec: PhaseSpec, rows: list[Row]) -> list[str | None]:
    """The name of the image that the policy is shown with each row."""
    return [row.get("image") if spec.images is not None else None for row in rows]


def _prepare(spec: PhaseSpec, rows: list[Row], id: str) -> Job:
    """Tokenise the rows and hold some out. Raises TrainError where none is left."""
    phase, task_prompt = spec.phase, spec.task_prompt
    local = fetch(spec.model, weights=False)
    tokenizer = load_tokenizer(
        local, task_prompt, spec.revision, spec.trust_remote_code, spec.chat_template_kwargs
    )
    images = None
    if names := list(filter(None, _shown(spec, rows))):
        how = spec.revision, spec.trust_remote_code, spec.image_arguments
        images = ImagePrompts(local, tokenizer, str(spec.images), names, *how)
    shown = None if images is None else images.prompt
    examples, dropped = tokenise(phase, rows, tokenizer, task_prompt, spec.settings.max_length, shown)
    for reason, count in dropped.items():
        log.warning("%s: %d of %d rows dropped: %s", phase, count, len(rows), reason)
    groups = {row_id(phase, row): str(row.get("query_id") or row["query"]) for row in rows}
    examples, held_out = hold_out(examples, groups, spec.settings.evaluate.share)
    if not examples:
        raise TrainError(f"{phase}: evaluate.share leaves no row of {len(held_out)} to train on: lower it")
    facts: Row = {
        "phase": phase,
        "job": id,
        "fingerprint": spec.fingerprint,
        "base_model": spec.model,
        "rows": len(examples),
        "held_out": len(held_out),
        "dropped": dict(dropped),
        **({"profiles": dict(spec.profiles)} if spec.profiles else {}),
    }
    end = end_of_turn(tokenizer, task_prompt)
    return Job(
        **vars(spec), id=id, examples=examples, held_out=held_out, tokenizer=tokenizer, end=end, facts=facts,
        shown=images.images if images is not None else None,
    )  # fmt: skip


def _fit(job: Job) -> None:
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from vpo_ray.train import checkpoints, failures
    from vpo_ray.train.worker import train_worker

    settings, kept = job.settings, job.kept
    checkpoints.refuse_other_workers(kept, settings.workers)
    failures.clear(kept)
    steps, meter = beside_driver(Steps), StepMeter(job.phase, job.steps)

    def look() -> Row:
        return meter.view(time.monotonic(), ray.get(steps.told.remote(), timeout=5))

    trainer = partial(
        TorchTrainer,
        train_worker,
        train_loop_config={"job": ray.put(job), "code": code(), "status": steps},
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=settings.resources_per_worker or None,
            label_selector=settings.labels or None,
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=join(job.run_uri, "checkpoints"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=checkpoints.checkpoint_config(settings),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    shapes = worker_shapes(job.phase, settings)
    require(shapes, job.placement_timeout_s)
    with watched(shapes, job.placement_timeout_s), Status(RunDir(job.run_uri), look):
        try:
            result = retried(lambda: trainer().fit(), job.phase, settings.max_failures)
        except TrainError as error:
            if message := failures.recorded(kept):
                raise TrainError(f"{job.phase}: {message}") from error
            raise TrainError(with_causes(str(error), RunDir(job.run_uri), "TrainWorker")) from error
    if result.return_value and "stopped" in result.return_value:
        raise TrainError(f"{job.phase}: {result.return_value['stopped']}")
    run_lock.check(kept)
    _discard(kept)


def _discard(kept: Folder) -> None:
    """Delete the checkpoints of a job that is done, if there are any."""
    if kept.fs.get_file_info(kept.path).type == pafs.FileType.Directory:
        kept.fs.delete_dir(kept.path)


def retried(fit: Callable[[], Any], phase: str, retries: int) -> Any:
    """The result of `fit`. Ray Train itself replaces a lost worker; but when a node is lost while workers
    start, its controller gives up, and another `fit` continues from the checkpoints.

    Raises:
        TrainError: more failures than `retries`, or one that is not about a node.
    """
    from ray.exceptions import NodeDiedError, RayActorError
    from ray.train import ControllerError, TrainingFailedError

    left = retries
    while True:
        try:
            return fit()
        except ControllerError as error:
            if left == 0 or not isinstance(error.controller_failure, RayActorError | NodeDiedError):
                raise TrainError(f"{phase} failed: {error}") from error
            left -= 1
            log.warning("%s: the workers could not start, trying again: %s", phase, error.controller_failure)
        except TrainingFailedError as error:
            raise TrainError(f"{phase} failed {retries + 1} times: {error}") from error


def _result(out: str, facts: Row, trained: bool) -> TrainResult:
    counts = facts["rows"], facts["dropped"]
    return TrainResult(out, facts["steps"], facts["metrics"], *counts, trained, tuple(facts["warnings"]))
