"""What every worker runs: reference log-probabilities, steps, evaluations, export.

Everything a step does follows from its number: its rows, its learning rate, its seed. So a
restarted worker needs only the last checkpoint and its step, and ends with the same weights as one that
was never killed.
"""

from __future__ import annotations

import logging
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from vpo_ray.files.folder import Folder, join
from vpo_ray.lifetime import bind_worker
from vpo_ray.recipe import result_keys
from vpo_ray.records import Row, content_id, seed_of
from vpo_ray.storage.model_cache import fetch
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train import checkpoints, failures, packing, zero
from vpo_ray.train.degenerate import degenerate
from vpo_ray.train.examples import TrainError
from vpo_ray.train.held_out import best, enough, evaluation_due
from vpo_ray.train.losses import METRICS, dpo_loss, response_sums, rl_loss, sft_loss
from vpo_ray.train.model_files import digest
from vpo_ray.train.phase import Job, RankState
from vpo_ray.train.policy import PackedPolicy, autocasts, check_packing
from vpo_ray.train.rehearsal import check_room
from vpo_ray.train.save_pretrained import export_policy
from vpo_ray.train.track import Trackers, values_of
from vpo_ray.train.vision import ImageFeatures
from vpo_ray.versions import check_code

log = logging.getLogger(__name__)

# Allowed mean difference per token due to packing: rounding of float32 and of bfloat16.
PACKING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Stopped(TrainError):
    """Training that no retry can fix (a loss that is not finite); every rank raises it."""


class Worker(RankState):
    """One rank at work."""

    def run(self) -> None:
        job, settings = self.job, self.job.settings
        untrained = zero.bit_sums(self.engine)
        first = checkpoints.resume(self)
        if self.rank == 0:
            self.trackers = Trackers(
                settings.track,
                job.phase,
                job.run_uri,
                job.id,
                f"{job.run_name} {job.phase}",
                _parameters(job),
                self.curve,
                self.status,
            )
        try:
            self._train(first)
            self._finish(untrained)
        except BaseException:
            if self.trackers:
                self.trackers.close(failed=True)
            raise
        if self.trackers:
            self.trackers.close()

    def _train(self, first: int) -> None:
        job, settings = self.job, self.job.settings
        leaving: list[str] = []
        if enough(self.curve, settings.evaluate):  # it stopped early, and died before the export
            return
        for step in range(first, job.steps):
            line, done = self.step(step), step + 1
            notice = ray.train.get_preemption_info() if settings.save_steps else None
            preempted = notice is not None and notice.preempted_node_ids != leaving
            leaving = notice.preempted_node_ids if notice else leaving
            save = checkpoints.checkpoint_due(done, job)
            evaluated = job.held_out and (
                save or evaluation_due(done, job.steps, len(job.examples), settings)
            )
            if evaluated:
                line |= self.evaluate()
            self.curve.append(line)
            self._warn(line)
            if evaluated and settings.evaluate.export == "best":
                save |= best(self.curve, settings.evaluate) is line
            # Not evaluated: that takes time, and an undisturbed run would not have it.
            save |= preempted
            if self.trackers:
                self.trackers.log(line)
            # Ray Train takes a report every 2 seconds: one a step would slow quick steps down.
            if save and done < job.steps:
                # A node that is about to go may not last until a background upload is done.
                checkpoints.save(self, done, wait=preempted)
            if evaluated and enough(self.curve, settings.evaluate):
                log.info("no better %s for a while: stopped after step %d", settings.evaluate.metric, done)
                return

    def step(self, step: int) -> Row:
        """One optimizer step over a global batch; its metrics, the same on every rank.

        Raises:
            Stopped: the loss or the gradient is not a finite number.
        """
        started = time.perf_counter()
        job, settings = self.job, self.job.settings
        rows = packing.batch(step, len(job.examples), settings.global_batch, job.seed)
        mine = self._packs(rows)
        learnt = sum(job.examples[r].response_tokens for r in rows)
        items = self._items(rows)
        lr = settings.lr * lr_factor(step, job.steps, settings.schedule, settings.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of("step", job.seed, step, self.rank))
        self.engine.train()
        sums = self._no_sums()
        bad: list[str] = []
        for n, members in enumerate(mine):
            self.engine.set_gradient_accumulation_boundary(n == len(mine) - 1)
            # ZeRO needs every rank in every micro step: one without rows computes a row and discards it.
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
        norm = zero.step(self.engine, settings)
        self._stop_if([] if math.isfinite(norm) else [job.examples[r].id for r in rows], step, "gradient")
        seconds = time.perf_counter() - started
        line: Row = {"step": step + 1, "epoch": (step + 1) * settings.epochs / job.steps}
        line |= self._means(sums, items)
        line |= {"lr": lr, "grad_norm": norm, "rows": len(rows), "tokens": learnt}
        if job.phase == "dpo":
            for place, side in enumerate(("chosen", "rejected")):
                tokens = sum(len(job.examples[r].responses[place]) for r in rows)
                line[f"{side}_tokens"] = tokens / len(rows)
        return line | {"seconds": seconds, "time": time.time()}

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Metrics of the held-out rows, as `eval_<name>`; the same on every rank."""
        job = self.job
        self.engine.eval()
        rows = list(range(len(job.examples), len(job.rows)))
        sums = self._no_sums()
        for members in self._held_out_packs:
            loss, metrics = self._loss(members or rows[:1])
            if members:
                sums += torch.cat([loss.double()[None], metrics])
        dist.all_reduce(sums)
        items = self._items(rows)
        return {f"eval_{name}": value for name, value in self._means(sums, items).items()}

    @cached_property
    def _held_out_packs(self) -> list[list[int]]:
        return self._packs(list(range(len(self.job.examples), len(self.job.rows))))

    def _packs(self, rows: list[int]) -> list[list[int]]:
        """This rank's packs of the rows."""
        sizes, settings = [self.job.rows[r].tokens for r in rows], self.job.settings
        shares = packing.spread(rows, sizes, self.workers, settings.micro_batch, settings.micro_tokens)
        return shares[self.rank]

    def _items(self, rows: list[int]) -> int:
        """What sums over a batch are divided by: its pairs, its responses, or the tokens that are learnt."""
        job = self.job
        if job.phase == "dpo":
            return len(rows)
        if job.phase == "rl" and job.rl.aggregate != "token":
            return sum(len(job.rows[r].responses) for r in rows)
        return sum(job.rows[r].response_tokens for r in rows)

    def _no_sums(self) -> torch.Tensor:
        return torch.zeros(1 + len(METRICS[self.job.phase]), dtype=torch.float64, device=self.device)

    def _means(self, sums: torch.Tensor, items: int) -> Row:
        names = ("loss", *METRICS[self.job.phase])
        return dict(zip(names, (sums / items).tolist(), strict=False))

    def _loss(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over these rows: the loss, and the phase's metrics."""
        pack = packing.pack([self.job.rows[r] for r in rows]).to(self.device)
        token_logps = self.engine(pack)
        if self.job.phase == "sft":
            return sft_loss(token_logps), self._no_sums()[1:]
        assert self.reference is not None
        if self.job.phase == "rl":
            assert self.sampled is not None
            sampled, reference = (self._tokens(table, rows) for table in (self.sampled, self.reference))
            advantages = torch.tensor([a for r in rows for a in self.job.rows[r].advantages])
            given = pack.lengths, advantages.to(self.device), self.job.rl
            return rl_loss(token_logps, sampled, reference, *given)
        reference = torch.from_numpy(self.reference[rows].reshape(-1)).to(self.device)
        return dpo_loss(token_logps, reference, pack.lengths, self.job.dpo)

    def _stop_if(self, ids: list[str], step: int, what: str) -> None:
        """Stop every rank when one reports rows with a loss or gradient that is not finite."""
        everywhere: list[list[str]] = [[] for _ in range(self.workers)]
        dist.all_gather_object(everywhere, ids)
        found = sorted({i for part in everywhere for i in part})
        if found:
            name = f"metrics/{self.job.phase}-stopped.json"
            if self.rank == 0:
                run = RunDir(self.job.run_uri)
                run.write_json(name, {"step": step + 1, "what": what, "rows": found, "job": self.job.id})
                run.write_metrics(self.job.phase, self.curve)
            raise Stopped(
                f"the {what} is not a finite number in step {step + 1}; "
                f"rows in that batch: {', '.join(found[:16])}{', ...' * (len(found) > 16)} "
                f"(all in {name}). Look at these rows, or lower the learning rate; the last "
                "checkpoint is kept"
            )

    def _warn(self, line: Row) -> None:
        """Log the guard's warnings, each kind once in a run, and keep them in the curve."""
        if self.job.phase != "dpo":
            return
        new = degenerate(self.curve, self.job.dpo)
        if new:
            known = {kind for earlier in self.curve for kind in earlier.get("warnings", {})}
            new = {k: v for k, v in new.items() if k not in known}
        if new:
            line["warnings"] = new
        for text in new.values() if self.rank == 0 else ():
            log.warning("dpo, step %d: %s", line["step"], text)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where the tokens of each row begin in a table of all learnt tokens, and where the last ones end."""
        return np.cumsum([0, *(example.response_tokens for example in self.job.rows)])

    def _tokens(self, table: np.ndarray, rows: list[int]) -> torch.Tensor:
        """What a table of all learnt tokens has for these rows."""
        parts = [table[self._starts[r] : self._starts[r + 1]] for r in rows]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    @torch.no_grad()
    def compute_reference(self, name: str) -> np.ndarray:
        """Log-probabilities of all rows under this engine's model, as RankState has a reference's,
        in float32, stored in the run under `name` (see reference_name) and computed only once."""
        job = self.job
        self.say("computing the reference's log-probabilities")
        self.engine.eval()
        rows = list(range(len(job.rows)))
        whole = job.phase == "rl"
        starts = self._starts if whole else np.arange(0, 2 * len(rows) + 1, 2)
        table = torch.zeros(int(starts[-1]), device=self.device)
        for members in self._packs(rows):
            pack = packing.pack([job.rows[r] for r in members or rows[:1]]).to(self.device)
            logps = self.engine(pack)
            values = (logps if whole else response_sums(logps, pack.lengths)).split(
                [int(starts[r + 1] - starts[r]) for r in members or rows[:1]]
            )
            for r, part in zip(members, values, strict=False):
                table[starts[r] : starts[r + 1]] = part
        dist.all_reduce(table)
        found = table.cpu().numpy()
        if not np.isfinite(found).all():
            bad = np.unique(np.searchsorted(starts, np.flatnonzero(~np.isfinite(found)), side="right") - 1)
            ids = [job.rows[r].id for r in bad]
            raise Stopped(f"the reference gives no finite log-probability for rows {', '.join(ids)}")
        if self.rank == 0:
            _references(job).write(name, found.tobytes())
        return found if whole else found.reshape(-1, 2)

    def _finish(self, untrained: Tensor) -> None:
        """Export what was trained; `untrained` are the checksums of the weights before the first step.

        Raises:
            Stopped: no weight has changed.
        """
        job, settings = self.job, self.job.settings
        self.say("writing the policy")
        line = self.curve[-1]
        if settings.evaluate.export == "best":
            line = checkpoints.load_best(self)
        if torch.equal(zero.bit_sums(self.engine), untrained):
            raise Stopped(
                f"{line['step']} steps changed no weight, so there is nothing to export: the learning "
                f"rate ({settings.lr:g}) or the gradients (norm {line['grad_norm']:.3g} in step "
                f"{line['step']}) are too small for {settings.dtype}. Raise lr, or look at the rows"
            )
        weights = zero.full_weights(self.engine, self.rank, trained_only=settings.lora is not None)
        if self.rank == 0:
            RunDir(job.run_uri).write_metrics(job.phase, self.curve)
            metrics = {k: line[k] for k, v in values_of(line).items() if k != "seconds" and math.isfinite(v)}
            facts = {
                **job.facts,
                "steps": len(self.curve),
                "exported_step": line["step"],
                "metrics": metrics,
                "resumed_after": self.resumed_after,
                "warnings": [text for x in self.curve for text in x.get("warnings", {}).values()],
            }
            export_policy(self.engine.module.model, weights, job, facts)
        ray.train.report(line)
        dist.barrier()


def lr_factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """Share of the peak learning rate in step `step` (from 0).

    With w steps of warm-up, step i of 1..w has i / w: the last is at full rate, and none at 0 (as
    transformers' first step is). After warm-up it follows transformers' schedules: linear or cosine down
    towards 0, or constant.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[
        schedule
    ]


def train_worker(config: dict[str, Any]) -> Row:
    """What Ray Train runs on each worker. Returns the message of a failure that no retry can fix."""
    check_code(config["code"])
    bind_worker()
    job: Job = ray.get(config["job"])
    message = failures.recorded(job.kept)
    if message is None:
        try:
            _work(job, config.get("status"))
        except Stopped as error:
            message = str(error)
        except Exception as error:
            # Raised to stop the other ranks too, which may wait for this one.
            if failures.is_permanent(error):
                failures.record(job.kept, error)
            raise
    return {} if message is None else {"stopped": message}


def _work(job: Job, status: Any) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    zero.prepare_process(job.settings.use_gpu)
    device = ray.train.torch.get_device()
    # Whose log-probabilities the phase needs: the reference's, and those of what sampled RL's candidates.
    needed = {} if job.phase == "sft" else {"reference": job.reference or job.model}
    if job.phase == "rl":
        needed["sampled"] = job.sampler or job.model
    models = set(needed.values()) | {job.model}
    if context.get_local_rank() == 0:
        for model in sorted(models):
            fetch(model)
    dist.barrier()

    autocast = autocasts(job.settings.autocast, device)
    products = "bfloat16" if autocast else job.settings.dtype

    def start(model: str) -> Worker:
        torch.manual_seed(job.seed)
        settings = zero.deepspeed_config(job.settings, workers)
        loaded = zero.load_model(fetch(model), job.settings, settings, job.revision, job.trust_remote_code)
        images = None if job.shown is None else ImageFeatures(job.shown, loaded, device)
        engine = zero.start_engine(PackedPolicy(loaded, autocast, images), job.settings, settings)
        return Worker(job, engine, rank, workers, device, status=status)

    names = {
        model: reference_name(job, _weights_id(fetch(model), job.revision, rank), products)
        for model in sorted(set(needed.values()))
    }
    found = {model: stored_reference(job, name, rank) for model, name in names.items()}
    for model, name in names.items():
        if found[model] is None and model != job.model:
            # One by one, so that there are never two models in memory.
            other = start(model)
            found[model] = other.compute_reference(name)
            zero.release(other.engine)
            del other
    worker = start(job.model)
    if rank == 0:
        lora = job.settings.lora
        check_room(job.out, zero.bytes_of(worker.engine, trained_only=lora is not None and not lora.merge))
    worker.engine.eval()
    longest = max(job.rows, key=lambda e: e.tokens)
    seeing = max((e for e in job.rows if (e.prompt < 0).any()), key=lambda e: e.tokens, default=longest)
    for example in (longest, *([seeing] if seeing is not longest else [])):
        check_packing(worker.engine, example, device, PACKING_TOLERANCE[products])
    if job.model in names and found[job.model] is None:
        found[job.model] = worker.compute_reference(names[job.model])
    worker.reference, worker.sampled = (
        found[needed[use]] if use in needed else None for use in ("reference", "sampled")
    )
    worker.run()


def reference_name(job: Job, weights: str, products: str) -> str:
    """Name of stored reference log-probabilities: a function of the weights, of the rows, and of the dtype
    that products of matrices are computed in."""
    data = [[e.id, e.prompt.tolist(), [r.tolist() for r in e.responses]] for e in job.rows]
    images = [] if job.shown is None else [[list(job.shown.names), dict(job.shown.arguments)]]
    return f"{content_id('reference', weights, products, data, *images)}.npy"


def stored_reference(job: Job, name: str, rank: int) -> np.ndarray | None:
    """Reference log-probabilities that an earlier start stored, or None; the same on all ranks."""
    found = [_references(job).exists(name) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        return None
    values = np.frombuffer(_references(job).read(name), dtype=np.float32).copy()
    return values if job.phase == "rl" else values.reshape(-1, 2)


def _references(job: Job) -> Folder:
    return Folder(join(job.run_uri, "checkpoints/reference"))


def _parameters(job: Job) -> Row:
    """The settings that trackers show: those that are not defaults."""
    shown = result_keys(job.settings.model_dump(mode="json", exclude_defaults=True))
    return {**shown, "phase": job.phase, "model": job.model, "fingerprint": job.facts.get("fingerprint")}


def _weights_id(model: str, revision: str | None, rank: int) -> str:
    """The identity of the weights by content, from rank 0's files; the same on every rank."""
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
