"""Training against TRL on one machine: the same policy, pairs, batches and arithmetic.

    python benchmarks/train.py                  # everything; the last line is one JSON object
    python benchmarks/train.py packed trl       # some variants

Variants, each in its own process (fp32, 2 threads, batches of 4 pairs, about 31M parameters with a
vocabulary of 32k, prompts of 200 tokens of which 150 are the task instruction, responses of 90 to
160): `packed` is what `vpo_ray.train` does; `unshared` packs without sharing prompts; `trl` is
TRL's DPOTrainer as it comes; `trl_best` has the reference precomputed and gradient checkpointing
off; `zero1` and `zero2` are ZeRO-3 on 1 and 2 workers; `checkpoints` trains through Ray with a
checkpoint every 20 steps.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

BATCH, WARM_UP = 4, 2
# Of everything, reference and setting up included; and of training steps alone, the first ones left out.
SPEEDS = ("pairs_per_second", "pairs_per_cpu_second", "steps_pairs_per_second", "steps_pairs_per_cpu_second")
VARIANTS = ("packed", "unshared", "trl_best", "trl", "zero1", "zero2", "checkpoints")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each variant, taken in turns")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        folder, variant = Path(args.inside), args.variants[0]
        (folder / f"{variant}.json").write_text(json.dumps(run(variant, folder, args.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        make_policy(Path(name) / "policy")
        results: dict[str, list[dict[str, Any]]] = {v: [] for v in args.variants}
        for _ in range(args.repeat):
            for variant in args.variants:
                command = [sys.executable, __file__, variant, "--inside", name, "--steps", str(args.steps)]
                env = os.environ | {"OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
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
                "weight_difference": max(abs(x - y) for x, y in zip(a["weights"], b["weights"], strict=True)),
            }
    if "zero1" in results and "zero2" in results:
        out["zero2_vs_zero1_memory"] = out["zero2"]["state_bytes"] / out["zero1"]["state_bytes"]
    return out


def run(variant: str, folder: Path, steps: int) -> dict[str, Any]:
    if variant == "checkpoints":
        return run_checkpoints(folder)
    if variant.startswith("zero"):
        return run_zero(int(variant[4:]), folder)
    work = run_trl if variant.startswith("trl") else run_ours
    return work(variant, folder, steps) | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def make_policy(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vpo_ray.tiny import make_policy as make_tiny_policy

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
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


def make_worker(folder: Path, pairs: int, rank: int = 0, workers: int = 1, **changes: Any) -> Any:
    """The worker that the training loop runs, in this process."""
    import torch
    import torch.distributed as dist

    from vpo_ray.recipe import Train
    from vpo_ray.train import zero
    from vpo_ray.train.loop import Job, Worker
    from vpo_ray.train.policy import PackedPolicy

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group-{os.getppid()}", rank=rank, world_size=workers
    )
    zero.prepare_process(use_gpu=False)
    values = {"epochs": 1, "lr": 1e-5, "schedule": "constant", "warmup_ratio": 0, "global_batch": BATCH}
    values |= {"micro_batch": BATCH, "dtype": "float32", "zero_stage": 0, "use_gpu": False} | changes
    settings = Train(**values)
    job = Job(
        "dpo", settings, "", None, False, make_examples(pairs), None, [], "", str(folder), 0, "bench", {}
    )
    config = zero.deepspeed_config(settings, workers)
    policy = PackedPolicy(zero.load_model(str(folder / "policy"), settings, config, None, False))
    return Worker(job, zero.start_engine(policy, settings, config), rank, workers, torch.device("cpu"))


def run_ours(variant: str, folder: Path, steps: int) -> dict[str, Any]:
    from vpo_ray.train import packing

    if variant == "unshared":
        packing.pack = partial(packing.pack, share=False)
    worker = make_worker(folder, BATCH * steps)
    # The reference is computed once for all epochs; here one epoch pays for it in full.
    started, cpu = time.perf_counter(), time.process_time()
    worker.compute_reference(variant)
    lines, clocks = [], [(time.perf_counter(), time.process_time())]
    for step in range(steps):
        lines.append(worker.step(step))
        clocks.append((time.perf_counter(), time.process_time()))
    return {
        "pairs_per_second": BATCH * steps / (time.perf_counter() - started),
        "pairs_per_cpu_second": BATCH * steps / (time.process_time() - cpu),
        **steps_speed([(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clocks)]),
        "losses": [line["loss"] for line in lines],
        "weights": sample_weights(worker.engine.module.model),
    }


def steps_speed(times: list[tuple[float, float]]) -> dict[str, float]:
    """From the seconds and CPU seconds of each step."""
    wall, cpu = (statistics.median(part[WARM_UP:]) for part in zip(*times, strict=True))
    return {"steps_pairs_per_second": BATCH / wall, "steps_pairs_per_cpu_second": BATCH / cpu}


def sample_weights(model: Any) -> list[float]:
    return [
        p.flatten()[:: max(1, p.numel() // 100)][:100].tolist()[i]
        for p in model.parameters()
        for i in (0, 50, -1)
    ]


def run_trl(variant: str, folder: Path, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
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
    examples = make_examples(BATCH * steps)
    order = [row for step in range(steps) for row in batch(step, len(examples), BATCH, 0)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        dict(zip(names, (ids.tolist() for ids in (examples[r].prompt, *examples[r].responses)), strict=True))
        for r in order
    ]
    best = (
        {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if variant == "trl_best" else {}
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(folder / variant),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        **best,
    )
    started, cpu = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    trainer = Tokenised(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    return {
        "pairs_per_second": BATCH * steps / (time.perf_counter() - started),
        "pairs_per_cpu_second": BATCH * steps / (time.process_time() - cpu),
        **steps_speed(times),
        "losses": [line["loss"] for line in trainer.state.log_history if "grad_norm" in line],
        "weights": sample_weights(trainer.model),
    }


def run_zero(workers: int, folder: Path) -> dict[str, Any]:
    """Bytes of parameters, gradients' partitions and optimizer state that the fullest rank holds."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(_zero_rank, (workers, folder), workers)
    ranks = [json.loads((folder / f"zero-{workers}-{rank}.json").read_text()) for rank in range(workers)]
    return {"state_bytes": max(r["bytes"] for r in ranks), "losses": ranks[0]["losses"]}


def _zero_rank(rank: int, workers: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    worker = make_worker(folder, 8, rank, workers, zero_stage=3, micro_batch=BATCH // workers)
    worker.compute_reference(f"zero{workers}")
    losses = [worker.step(step)["loss"] for step in range(2)]
    optimizer = worker.engine.optimizer
    held = [p.ds_tensor if p.ds_tensor is not None else p for p in worker.engine.module.parameters()]
    held += optimizer.fp32_partitioned_groups_flat
    held += [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    result = {"bytes": sum(t.numel() * t.element_size() for t in held), "losses": losses}
    (folder / f"zero-{workers}-{rank}.json").write_text(json.dumps(result))


def run_checkpoints(folder: Path) -> dict[str, Any]:
    """Share of the time between the first and the last step that checkpoints took."""
    import ray

    from vpo_ray.recipe import Train
    from vpo_ray.storage import RunDir
    from vpo_ray.train import train

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
        global_batch=BATCH,
        micro_batch=BATCH,
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
        _temp_dir=str(folder / "ray"),
    )
    train(
        "dpo",
        settings,
        model=str(folder / "policy"),
        rows=rows,
        task_prompt="Rewrite this request for a video model.\n\n{query}",
        out=str(folder / "run" / "out"),
        run_uri=str(folder / "run"),
        seed=0,
        fingerprint="bench",
    )
    ray.shutdown()
    curve = RunDir(folder / "run").metrics("dpo")
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
