"""What the benchmarks of training share: a policy of a known shape, our worker and a peer's trainer each in a
process of its own, and the figures of both."""

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not timed

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

# Clocks: by the wall and in CPU time, in seconds.
Clocks = tuple[float, float]


@dataclass(frozen=True)
class Chosen:
    """What a process measures, and how large. `batch` rows (pairs or groups) make a step."""

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

    def figures(self, unit: str, started: Clocks, steps: Sequence[Clocks]) -> dict[str, float]:
        """Speeds in rows, called `unit`, from when everything began, and from the seconds of each step; and
        memory."""
        everything = [now - then for now, then in zip(clocks(), started, strict=True)]
        a_step = [statistics.median(part[WARM_UP:]) for part in zip(*steps, strict=True)]
        values = [self.batch * self.steps / s for s in everything] + [self.batch / s for s in a_step]
        return dict(zip(speeds(unit), values, strict=True)) | {"gib": self.peak_bytes() / 2**30}

    def peak_bytes(self) -> int:
        import torch

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        return torch.cuda.max_memory_allocated() if self.gpu else resident


def clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


def speeds(unit: str) -> tuple[str, ...]:
    """Names: of everything, reference and setting up included; and of training steps alone, the first ones
    left out."""
    both = (f"{unit}_per_second", f"{unit}_per_cpu_second")
    return *both, *(f"steps_{name}" for name in both)


def arguments(description: str, variants: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=variants, metavar="VARIANT", help=", ".join(variants))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each variant, taken in turns")
    parser.add_argument("--batch", type=int, default=4, help="pairs or groups a step (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="31m", help="of the policy (%(default)s)")
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank, not everything")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, where its name is not known")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser


def measure(
    args: argparse.Namespace, script: str, choose: Callable[..., Chosen]
) -> dict[str, list[dict[str, Any]]]:
    """Results of each variant, every run in a process of its own that runs `script` with `--inside`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        make_policy(Path(name) / "policy", args.shape)
        results: dict[str, list[dict[str, Any]]] = {v: [] for v in args.variants}
        for _ in range(args.repeat):
            for variant in args.variants:
                chosen = choose(variant, name, args.steps, args.batch, args.lora, peak_tflops(args))
                command = [sys.executable, script, "--inside", json.dumps(asdict(chosen))]
                env = os.environ | {"OMP_NUM_THREADS": "2", "LOCAL_RANK": "0"}
                env["OMP_WAIT_POLICY"] = "passive"  # so that CPU seconds count work, not waiting
                subprocess.run(command, check=True, env=env, stdout=sys.stderr)
                result = json.loads((Path(name) / f"{variant}.json").read_text("utf-8"))
                results[variant].append(result)
                sys.stderr.write(f"{variant}: { {k: v for k, v in result.items() if k != 'weights'} }\n")
    return results


def keep(chosen: Chosen, result: dict[str, Any]) -> None:
    """Where `measure` looks for it."""
    Path(chosen.folder, f"{chosen.variant}.json").write_text(json.dumps(result), "utf-8")


def medians(results: dict[str, list[dict[str, Any]]], unit: str) -> dict[str, Any]:
    """Each variant's last result, with the median speed of its runs."""
    out: dict[str, Any] = {}
    for variant, runs in results.items():
        out[variant] = {k: v for k, v in runs[-1].items() if k not in ("losses", "norms", "weights")}
        if f"{unit}_per_second" in runs[0]:
            for speed in speeds(unit):
                out[variant][speed] = statistics.median(r[speed] for r in runs)
    return out


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


def make_texts(count: int, responses: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """Token ids by chance: prompts of 190 to 210, 150 of them in all, and responses of 90 to 160."""
    import numpy as np

    random = np.random.default_rng(0)
    ids = lambda n: random.integers(2, 32000, n).astype(np.int32)  # noqa: E731
    instruction, answer = ids(135), ids(15)
    return [
        (
            np.concatenate([instruction, ids(random.integers(40, 61)), answer]),
            tuple(ids(random.integers(90, 161)) for _ in range(responses)),
        )
        for _ in range(count)
    ]


def settings_of(chosen: Chosen) -> dict[str, Any]:
    """What a recipe's section of a phase has for it."""
    lora = {"r": chosen.lora, "alpha": 2 * chosen.lora, "dropout": 0} if chosen.lora else None
    values = {"epochs": 1, "lr": 1e-5, "schedule": "constant", "warmup_ratio": 0, "zero_stage": 0}
    values |= {"global_batch": chosen.batch, "micro_batch": chosen.batch, "use_gpu": chosen.gpu}
    return values | {"dtype": "bfloat16" if chosen.gpu else "float32", "lora": lora}


def make_worker(
    chosen: Chosen, phase: str, settings: Any, examples: list[Any], rank: int = 0, workers: int = 1
) -> Any:
    """The worker that the training loop runs, in this process."""
    import torch
    import torch.distributed as dist

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
    job = Job(
        phase=phase, settings=settings, model="", task_prompt="", out="", run_uri=chosen.folder, seed=0,
        fingerprint="", id="bench", examples=examples, tokenizer=None, end=[], facts={},
    )  # fmt: skip
    config = zero.deepspeed_config(settings, workers)
    policy = PackedPolicy(zero.load_model(chosen.policy, settings, config, None, False))
    engine = zero.start_engine(policy, settings, config)
    return Worker(job, engine, rank, workers, torch.device("cuda" if gpu else "cpu"))


def timed_steps(worker: Any, steps: int) -> tuple[list[dict[str, Any]], list[Clocks]]:
    """Our worker's lines of all steps, and what each step took."""
    lines, at = [], [clocks()]
    for step in range(steps):
        lines.append(worker.step(step))
        at.append(clocks())
    return lines, [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(at)]


def step_clock() -> tuple[Any, list[Clocks]]:
    """A callback for transformers' trainer, and the list of what each step took that it fills."""
    from transformers import TrainerCallback

    times: list[Clocks] = []

    class StepClock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = clocks()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(tuple(b - a for a, b in zip(self.began, clocks(), strict=True)))  # type: ignore

    return StepClock(), times


def sample_weights(model: Any) -> list[float]:
    return [
        p.flatten()[:: max(1, p.numel() // 100)][:100].tolist()[i]
        for p in model.parameters()
        for i in (0, 50, -1)
    ]
