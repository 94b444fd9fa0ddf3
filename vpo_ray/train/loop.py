"""The loop that every worker runs: reference log-probabilities, steps, checkpoints, export.

Everything a step does follows from its number: its rows, its learning rate, its seed. So a
restarted worker needs only the last checkpoint and the step it stands for, and ends with the same
weights as one that was never killed.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from vpo_ray.recipe import Train
from vpo_ray.records import Row, content_id, seed_of
from vpo_ray.storage import Folder, RunDir, join
from vpo_ray.train import packing, zero
from vpo_ray.train.examples import Example, Phase, TrainError
from vpo_ray.train.export import export
from vpo_ray.train.losses import DPO_METRICS, dpo_loss, sft_loss
from vpo_ray.train.model_files import digest, fetch
from vpo_ray.train.policy import PackedPolicy, check_packing, response_sums

log = logging.getLogger(__name__)

# Mean difference per token that packing may make: rounding of float32 and of bfloat16.
PACKING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Job:
    """One phase as the driver hands it to the workers."""

    phase: Phase
    settings: Train
    model: str
    revision: str | None
    trust_remote_code: bool
    examples: list[Example]
    tokenizer: Any
    end: list[int]
    out: str
    run_uri: str
    seed: int
    id: str
    facts: Row

    @property
    def steps(self) -> int:
        return packing.total_steps(len(self.examples), self.settings.global_batch, self.settings.epochs)


class Stopped(TrainError):
    """Training that no retry can mend (a loss that is not a number)."""


@dataclass
class Worker:
    """State of one rank: the engine, and the curve so far (rank 0's is the one that is stored)."""

    job: Job
    engine: Any
    rank: int
    workers: int
    device: torch.device
    reference: np.ndarray | None = None
    curve: list[Row] = field(default_factory=list)
    resumed_after: int | None = None

    def run(self) -> None:
        for step in range(self._resume(), self.job.steps):
            line = self.step(step)
            self.curve.append(line)
            done = step + 1
            every = self.job.settings.save_steps
            if every and done % every == 0 and done < self.job.steps:
                self._save(done)
            else:
                ray.train.report(line)
        self._finish()

    def step(self, step: int) -> Row:
        """One optimizer step over a global batch; its metrics, the same on every rank.

        Raises:
            Stopped: the loss or the gradient is not a finite number.
        """
        started = time.perf_counter()
        job, settings = self.job, self.job.settings
        rows = packing.batch(step, len(job.examples), settings.global_batch, job.seed)
        shares = packing.spread(
            rows, [job.examples[r].tokens for r in rows], self.workers, settings.micro_batch
        )
        learnt = sum(job.examples[r].response_tokens for r in rows)
        items = len(rows) if job.phase == "dpo" else learnt
        lr = settings.lr * lr_factor(step, job.steps, settings.schedule, settings.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of("step", job.seed, step, self.rank))
        self.engine.train()
        sums = torch.zeros(1 + len(DPO_METRICS), dtype=torch.float64, device=self.device)
        bad: list[str] = []
        mine = shares[self.rank]
        for n, members in enumerate(mine):
            self.engine.set_gradient_accumulation_boundary(n == len(mine) - 1)
            # ZeRO needs every rank in every micro step: one without rows does a row's work for nothing.
            loss, metrics = self._loss(members or rows[:1])
            if not members:
                loss, metrics = loss * 0, metrics * 0
            elif not torch.isfinite(loss):
                bad += [job.examples[r].id for r in members]
            # DeepSpeed averages gradients over workers; the loss is a mean over the global batch.
            self.engine.backward(loss * (self.workers / items))
            sums += torch.cat([loss.detach().double()[None], metrics])
        dist.all_reduce(sums)
        self._stop_if(bad, step, "loss")
        norm = zero.step(self.engine)
        self._stop_if([] if math.isfinite(norm) else [job.examples[r].id for r in rows], step, "gradient")
        values = (sums / items).tolist()
        seconds = time.perf_counter() - started
        line: Row = {"step": step + 1, "epoch": (step + 1) * settings.epochs / job.steps, "loss": values[0]}
        line |= {"lr": lr, "grad_norm": norm, "rows": len(rows), "tokens": learnt}
        line |= {"seconds": seconds, "time": time.time()}
        return line | (dict(zip(DPO_METRICS, values[1:], strict=True)) if job.phase == "dpo" else {})

    def _loss(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over these rows: the loss, and the metrics of DPO."""
        pack = packing.pack([self.job.examples[r] for r in rows]).to(self.device)
        token_logps = self.engine(pack)
        if self.job.phase == "sft":
            return sft_loss(token_logps), torch.zeros(
                len(DPO_METRICS), dtype=torch.float64, device=self.device
            )
        assert self.reference is not None
        reference = torch.from_numpy(self.reference[rows].reshape(-1)).to(self.device)
        return dpo_loss(response_sums(token_logps, pack.lengths), reference, pack.lengths, self.job.settings)

    def _stop_if(self, ids: list[str], step: int, what: str) -> None:
        """Stop every rank when one has ids of a batch with a bad number."""
        everywhere: list[list[str]] = [[] for _ in range(self.workers)]
        dist.all_gather_object(everywhere, ids)
        found = sorted({i for part in everywhere for i in part})
        if found:
            raise Stopped(
                f"the {what} is not a finite number in step {step + 1}; "
                f"rows in that batch: {', '.join(found)}. "
                "Look at these rows, or lower the learning rate; the last checkpoint is kept"
            )

    @torch.no_grad()
    def compute_reference(self, weights: str) -> None:
        """Log-probabilities of all responses under the untrained policy, [rows, 2] float32.

        They are stored in the run by the content of weights and data, and computed once.
        """
        job = self.job
        data = [[e.id, e.prompt.tolist(), [r.tolist() for r in e.responses]] for e in job.examples]
        name = f"{content_id('reference', weights, job.settings.dtype, data)}.npy"
        folder = Folder(join(job.run_uri, "checkpoints/reference"))
        found = [folder.exists(name) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            self.reference = np.frombuffer(folder.read(name), dtype=np.float32).reshape(-1, 2).copy()
            return
        self.engine.eval()
        table = torch.zeros(len(job.examples), 2, device=self.device)
        rows = list(range(len(job.examples)))
        sizes = [e.tokens for e in job.examples]
        for members in packing.spread(rows, sizes, self.workers, job.settings.micro_batch)[self.rank]:
            pack = packing.pack([job.examples[r] for r in members or rows[:1]]).to(self.device)
            sums = response_sums(self.engine(pack), pack.lengths)
            if members:
                table[members] = sums.view(-1, 2)
        dist.all_reduce(table)
        self.reference = table.cpu().numpy()
        if not np.isfinite(self.reference).all():
            ids = [job.examples[r].id for r in np.flatnonzero(~np.isfinite(self.reference).all(axis=1))]
            raise Stopped(f"the untrained policy gives no finite log-probability for rows {', '.join(ids)}")
        if self.rank == 0:
            folder.write(name, self.reference.tobytes())

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; the step to go on with."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            progress = Folder(folder).read_json(PROGRESS)
            if progress["workers"] != self.workers:
                raise Stopped(
                    f"the checkpoint at step {progress['step']} was written by {progress['workers']} "
                    f"workers, this run has {self.workers}; a sharded checkpoint needs the same number. Set "
                    f"workers to {progress['workers']}, or remove {Path(checkpoint.path).parent}"
                )
            self.engine.load_checkpoint(folder, tag="state")
        self.curve, self.resumed_after = progress["curve"], progress["step"]
        log.info("%s goes on after step %d", self.job.phase, progress["step"])
        return progress["step"]

    def _save(self, step: int) -> None:
        """Write this rank's shard, and upload it while training goes on."""
        folder = Path(tempfile.mkdtemp(prefix="vpo-checkpoint-"))
        self.engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        if self.rank == 0:
            Folder(folder).write_json(PROGRESS, {"step": step, "workers": self.workers, "curve": self.curve})
            RunDir(self.job.run_uri).write_metrics(self.job.phase, self.curve)
        ray.train.report(
            self.curve[-1],
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{step:06}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _finish(self) -> None:
        weights = zero.full_weights(self.engine, self.rank)
        if self.rank == 0:
            job = self.job
            RunDir(job.run_uri).write_metrics(job.phase, self.curve)
            last = {k: v for k, v in self.curve[-1].items() if k not in ("step", "seconds", "time")}
            facts = {**job.facts, "steps": job.steps, "metrics": last, "resumed_after": self.resumed_after}
            export(self.engine.module.model, weights, job.tokenizer, job.end, job.out, facts)
        dist.barrier()


def lr_factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """Share of the peak learning rate in step `step` (from 0), as transformers' schedules have it:
    a linear warm-up from 0, then linear or cosine down to 0, or constant."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[
        schedule
    ]


def train_worker(config: dict[str, Any]) -> Row:
    """What Ray Train runs on each worker; on a problem that no retry mends, returns its message.

    Raises:
        TrainError: the model cannot be trained like this.
    """
    job: Job = ray.get(config["job"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    zero.prepare_process(job.settings.use_gpu)
    device = ray.train.torch.get_device()
    torch.manual_seed(job.seed)
    if context.get_local_rank() == 0:
        fetch(job.model)
    dist.barrier()
    folder = fetch(job.model)
    settings = zero.deepspeed_config(job.settings, workers)
    try:
        model = zero.load_model(folder, job.settings, settings, job.revision, job.trust_remote_code)
        engine = zero.start_engine(PackedPolicy(model), job.settings, settings)
        worker = Worker(job, engine, rank, workers, device)
        engine.eval()
        check_packing(
            engine, max(job.examples, key=lambda e: e.tokens), device, PACKING_TOLERANCE[job.settings.dtype]
        )
        if job.phase == "dpo":
            worker.compute_reference(_weights_id(folder, job.revision, rank))
        worker.run()
    except TrainError as error:
        return {"stopped": str(error)}
    return {}


def _weights_id(model: str, revision: str | None, rank: int) -> str:
    """Names the weights by content, the same on every rank: from rank 0's files."""
    from transformers.utils import cached_file

    names: list[str | None] = [None]
    if rank == 0:
        folder = (
            model
            if Path(model).is_dir()
            else Path(cached_file(model, "config.json", revision=revision)).parent
        )
        names = [digest(str(folder))]
    dist.broadcast_object_list(names, src=0)
    return str(names[0])
