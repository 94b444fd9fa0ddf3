"""Training against TRL on one machine: the same policy, pairs, batches and arithmetic.

    python benchmarks/train.py                  # everything; the last line is one JSON object
    python benchmarks/train.py packed trl       # some variants
    python benchmarks/train.py packed sdpa trl_best --shape llama-3-8b --lora 16 --batch 16    # on a GPU

Variants, each in its own process (fp32, 2 threads, batches of 4 pairs, about 31M parameters with a
vocabulary of 32k, prompts of 200 tokens of which 150 are the task instruction, responses of 90 to
160): `packed` is what `vpo_ray.train` does; `sdpa` is the same through torch's SDPA, run by run;
`unshared` packs without sharing prompts; `trl` is TRL's DPOTrainer as it comes; `trl_best` has the
reference precomputed and gradient checkpointing off; `zero1` and `zero2` are ZeRO-3 on 1 and 2
workers; `checkpoints` trains through Ray with a checkpoint every 20 steps.

Another `--shape` has random weights of that size. Where there is a GPU it is used, in bf16; memory is
then what torch allocated on it, and `mfu` the share of its peak: `--peak-tflops`, known for some.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not timed
# Of everything, reference and setting up included; and of training steps alone, the first ones left out.
SPEEDS = ("pairs_per_second", "pairs_per_cpu_second", "steps_pairs_per_second", "steps_pairs_per_cpu_second")
VARIANTS = ("packed", "unshared", "trl_best", "trl", "zero1", "zero2", "checkpoints")

# The 31M model, Llama 3.2 1B and Llama 3 8B: config.json of meta-llama/Llama-3.2-1B and Meta-Llama-3-8B.
SHAPES: dict[str, dict[str, Any]] = {
    "31m": {
        "vocab_size": 32000,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}

# Dense bf16 TFLOP/s by the name that CUDA gives a device: NVIDIA's data sheets.
PEAK_TFLOPS = {"A100": 312, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250}


@dataclass(frozen=True)
class Chosen:
    """What a process measures, and how large."""

    variant: str
    folder: str
    steps: int
    batch: int
    lora: int | None
    peak_tflops: float | None

    @property
    def policy(self) -> str:
        return f"{self.folder}/policy"

    @property
    def gpu(self) -> bool:
        import torch

        return torch.cuda.is_available() and not self.variant.startswith(("zero", "checkpoints"))

    def figures(self, started: float, cpu: float, steps: list[tuple[float, float]]) -> dict[str, float]:
        """Speeds, from when everything began, by the clock and in CPU time, and from the seconds of each
        step; and memory."""
        pairs = self.batch * self.steps
        by_clock, by_cpu = (statistics.median(part[WARM_UP:]) for part in zip(*steps, strict=True))
        everything = pairs / (time.perf_counter() - started), pairs / (time.process_time() - cpu)
        values = (*everything, self.batch / by_clock, self.batch / by_cpu)
        return dict(zip(SPEEDS, values, strict=True)) | {"gib": self.peak_bytes() / 2**30}

    def peak_bytes(self) -> int:
        import torch

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        return torch.cuda.max_memory_allocated() if self.gpu else resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each variant, taken in turns")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="31m", help="of the policy (%(default)s)")
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank, not everything")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, where its name is not known")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        chosen = Chosen(**json.loads(args.inside))
        Path(chosen.folder, f"{chosen.variant}.json").write_text(json.dumps(run(chosen)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        make_policy(Path(name) / "policy", args.shape)
        results: dict[str, list[dict[str, Any]]] = {v: [] for v in args.variants}
        for _ in range(args.repeat):
            for variant in args.variants:
                chosen = Chosen(variant, name, args.steps, args.batch, args.lora, peak_tflops(args))
                command = [sys.executable, __file__, "--inside", json.dumps(asdict(chosen))]
                env = os.environ | {"OMP_NUM_THREADS": "2", "LOCAL_RANK": "0"}
                env["OMP_WAIT_POLICY"] = "passive"  # so that CPU seconds count work, not waiting
                subprocess.run(command, check=True, env=env, stdout=sys.stderr)
                result = json.loads((Path(name) / f"{variant}.json").read_text())
                results[variant].append(result)
                sys.stderr.write(f"{variant}: { {k: v for k, v in result.items() if k != 'weights'} }\n")
        sys.stdout.write(json.dumps(summary(results)) + "\n")


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The median speed of each variant, and the ratios between variants."""
    out: dict[str, Any] = {}
    for variant, runs in results.items():
        out[variant] = {k: v for k, v in runs[-1].items() if k not in ("losses", "weights")}
        if "pairs_per_second" in runs[0]:
            for speed in SPEEDS:
                out[variant][speed] = statistics.median(r[speed] for r in runs)
    for theirs in ("trl", "trl_best"):
        if "packed" in results and theirs in results:
            a, b = results["packed"][-1], results[theirs][-1]
            out[f"packed_vs_{theirs}"] = {
                **{speed: out["packed"][speed] / out[theirs][speed] for speed in SPEEDS},
                "memory": a["gib"] / b["gib"],
                "loss_difference": max(abs(x - y) / y for x, y in zip(a["losses"], b["losses"], strict=True)),
            }
            if a["weights"]:
                pairs = zip(a["weights"], b["weights"], strict=True)
                out[f"packed_vs_{theirs}"]["weight_difference"] = max(abs(x - y) for x, y in pairs)
    if "zero1" in results and "zero2" in results:
        out["zero2_vs_zero1_memory"] = out["zero2"]["state_bytes"] / out["zero1"]["state_bytes"]
    return out


def run(chosen: Chosen) -> dict[str, Any]:
    if chosen.variant == "checkpoints":
        return run_checkpoints(chosen)
    if chosen.variant.startswith("zero"):
        return run_zero(int(chosen.variant[4:]), chosen)
    return (run_trl if chosen.variant.startswith("trl") else run_ours)(chosen)


def peak_tflops(args: argparse.Namespace) -> float | None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return args.peak_tflops or next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def make_policy(folder: Path, shape: str) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vpo_ray.world.tiny import make_policy as make_tiny_policy

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(**SHAPES[shape], **special, max_position_embeddings=2048)
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    model.save_pretrained(folder)
    make_tiny_policy(folder.parent / "tiny")
    AutoTokenizer.from_pretrained(folder.parent / "tiny").save_pretrained(folder)


def make_examples(count: int) -> list[Any]:
    import numpy as np

    from vpo_ray.train.examples import Example

    random = np.random.default_rng(0)
    ids = lambda n: random.integers(2, 32000, n).astype(np.int32)  # noqa: E731
    instruction, answer = ids(135), ids(15)
    return [
        Example(
            f"pair-{n:04}",
            np.concatenate([instruction, ids(random.integers(40, 61)), answer]),
            tuple(ids(random.integers(90, 161)) for _ in range(2)),
        )
        for n in range(count)
    ]


def make_worker(chosen: Chosen, pairs: int, rank: int = 0, workers: int = 1, **changes: Any) -> Any:
    """The worker that the training loop runs, in this process."""
    import torch
    import torch.distributed as dist

    from vpo_ray.recipe import Train
    from vpo_ray.train import zero
    from vpo_ray.train.phase import Job
    from vpo_ray.train.policy import PackedPolicy
    from vpo_ray.train.worker import Worker

    gpu = chosen.gpu
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{chosen.folder}/group-{os.getppid()}",
        rank=rank,
        world_size=workers,
    )
    zero.prepare_process(gpu)
    lora = {"r": chosen.lora, "alpha": 2 * chosen.lora, "dropout": 0} if chosen.lora else None
    values = {"epochs": 1, "lr": 1e-5, "schedule": "constant", "warmup_ratio": 0, "zero_stage": 0}
    values |= {"global_batch": chosen.batch, "micro_batch": chosen.batch, "use_gpu": gpu}
    values |= {
        "dtype": "bfloat16" if gpu else "float32",
        "lora": lora,
    } | changes
    settings = Train(**values)
    job = Job(
        phase="dpo", settings=settings, model="", task_prompt="", out="", run_uri=chosen.folder, seed=0,
        fingerprint="", id="bench", examples=make_examples(pairs), tokenizer=None, end=[], facts={},
    )  # fmt: skip
    config = zero.deepspeed_config(settings, workers)
    policy = PackedPolicy(zero.load_model(chosen.policy, settings, config, None, False))
    return Worker(
        job,
        zero.start_engine(policy, settings, config),
        rank,
        workers,
        torch.device("cuda" if gpu else "cpu"),
    )


def run_ours(chosen: Chosen) -> dict[str, Any]:
    from vpo_ray.train import attention, packing

    if chosen.variant == "unshared":
        packing.pack = partial(packing.pack, share=False)
    if chosen.variant == "sdpa":
        attention.kernel_for = lambda query, dropout: attention.sdpa
    worker = make_worker(chosen, chosen.batch * chosen.steps)
    # The reference is computed once for all epochs; here one epoch pays for it in full.
    started, cpu = time.perf_counter(), time.process_time()
    worker.compute_reference(chosen.variant)
    lines, clocks = [], [(time.perf_counter(), time.process_time())]
    for step in range(chosen.steps):
        lines.append(worker.step(step))
        clocks.append((time.perf_counter(), time.process_time()))
    speed = chosen.figures(started, cpu, [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clocks)])
    return {
        **speed,
        **work_of_a_step(worker, chosen, speed["steps_pairs_per_second"] / chosen.batch),
        "losses": [line["loss"] for line in lines],
        "weights": [] if chosen.lora else sample_weights(worker.engine.module.model),
    }


def work_of_a_step(worker: Any, chosen: Chosen, steps_per_second: float) -> dict[str, float | None]:
    """Tokens that a step computes (prompts shared) and learns, and the share of the GPU's peak that its
    matrix products take; nothing is computed twice without activation checkpointing."""
    from torch.utils.flop_counter import FlopCounterMode

    from vpo_ray.train import packing

    step = chosen.steps - 1
    rows = packing.batch(step, len(worker.job.examples), chosen.batch, 0)
    pack = packing.pack([worker.job.examples[row] for row in rows])
    with FlopCounterMode(display=False) as counter:
        worker.step(step)
    flops = counter.get_total_flops() * steps_per_second
    return {
        "tokens_per_second": pack.ids.numel() * steps_per_second,
        "learnt_tokens_per_second": pack.targets.numel() * steps_per_second,
        "tflops": flops / 1e12,
        "mfu": flops / 1e12 / chosen.peak_tflops if chosen.peak_tflops else None,
    }


def sample_weights(model: Any) -> list[float]:
    return [
        p.flatten()[:: max(1, p.numel() // 100)][:100].tolist()[i]
        for p in model.parameters()
        for i in (0, 50, -1)
    ]


def run_trl(chosen: Chosen) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from vpo_ray.train.packing import batch

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    os.environ.pop("LOCAL_RANK")
    size, steps = chosen.batch, chosen.steps
    examples = make_examples(size * steps)
    order = [row for step in range(steps) for row in batch(step, len(examples), size, 0)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        dict(zip(names, (ids.tolist() for ids in (examples[r].prompt, *examples[r].responses)), strict=True))
        for r in order
    ]
    best = (
        {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        if chosen.variant == "trl_best"
        else {}
    )
    model = AutoModelForCausalLM.from_pretrained(
        chosen.policy, dtype=torch.bfloat16 if chosen.gpu and chosen.lora else torch.float32
    )
    config = DPOConfig(
        output_dir=f"{chosen.folder}/{chosen.variant}",
        per_device_train_batch_size=size,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=None,
        bf16=chosen.gpu,
        use_cpu=not chosen.gpu,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        **best,
    )
    started, cpu = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(chosen.policy)
    trainer = Tokenised(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
        peft_config=LoraConfig(r=chosen.lora, lora_alpha=2 * chosen.lora, target_modules="all-linear")
        if chosen.lora
        else None,
    )
    trainer.train()
    return {
        **chosen.figures(started, cpu, times),
        "losses": [line["loss"] for line in trainer.state.log_history if "grad_norm" in line],
        "weights": [] if chosen.lora else sample_weights(trainer.model),
    }


def run_zero(workers: int, chosen: Chosen) -> dict[str, Any]:
    """Bytes of parameters, gradients' partitions and optimizer state that the fullest rank holds."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(_zero_rank, (workers, chosen), workers)
    ranks = [json.loads(Path(chosen.folder, f"zero-{rank}.json").read_text()) for rank in range(workers)]
    return {"state_bytes": max(r["bytes"] for r in ranks), "losses": ranks[0]["losses"]}


def _zero_rank(rank: int, workers: int, chosen: Chosen) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    micro = chosen.batch // workers
    worker = make_worker(chosen, 2 * chosen.batch, rank, workers, zero_stage=3, micro_batch=micro)
    worker.compute_reference(chosen.variant)
    losses = [worker.step(step)["loss"] for step in range(2)]
    optimizer = worker.engine.optimizer
    held = [p.ds_tensor if p.ds_tensor is not None else p for p in worker.engine.module.parameters()]
    held += optimizer.fp32_partitioned_groups_flat
    held += [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    result = {"bytes": sum(t.numel() * t.element_size() for t in held), "losses": losses}
    Path(chosen.folder, f"zero-{rank}.json").write_text(json.dumps(result))


def run_checkpoints(chosen: Chosen) -> dict[str, Any]:
    """Share of the time between the first and the last step that checkpoints took."""
    import ray

    from vpo_ray.recipe import Train
    from vpo_ray.storage.run_dir import RunDir
    from vpo_ray.train import PhaseSpec, train

    rows = [
        {
            "pair_id": f"pair-{n:03}",
            "query": f"query {n} of many",
            "chosen": "a small dog runs over the green grass " * 8,
            "rejected": "dog, grass, sun, best quality " * (8 + n % 3),
        }
        for n in range(200)
    ]
    settings = Train(
        epochs=1,
        lr=1e-5,
        global_batch=chosen.batch,
        micro_batch=chosen.batch,
        dtype="float32",
        use_gpu=False,
        resources_per_worker={"CPU": 2},
        save_steps=20,
    )
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=f"{chosen.folder}/ray",
    )
    spec = PhaseSpec(
        phase="dpo",
        settings=settings,
        model=chosen.policy,
        task_prompt="Rewrite this request for a video model.\n\n{query}",
        out=f"{chosen.folder}/run/out",
        run_uri=f"{chosen.folder}/run",
        seed=0,
        fingerprint="bench",
    )
    train(spec, rows)
    ray.shutdown()
    curve = RunDir(f"{chosen.folder}/run").metrics("dpo")
    gaps = [b["time"] - a["time"] - b["seconds"] for a, b in pairwise(curve)]
    wall = curve[-1]["time"] - curve[0]["time"]
    lost = sum(gap for step, gap in enumerate(gaps, start=1) if step % settings.save_steps == 0)
    return {
        "seconds_of_50_steps": wall,
        "share_lost_to_checkpoints": lost / wall,
        "share_lost_to_reports": (sum(gaps) - lost) / wall,
    }


if __name__ == "__main__":
    main()
