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

import json
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from side_by_side import (
    Chosen,
    arguments,
    clocks,
    keep,
    make_texts,
    make_worker,
    measure,
    medians,
    sample_weights,
    settings_of,
    speeds,
    step_clock,
    timed_steps,
)

VARIANTS = ("packed", "unshared", "trl_best", "trl", "zero1", "zero2", "checkpoints")


def main() -> None:
    args = arguments(__doc__, VARIANTS).parse_args()
    if args.inside:
        chosen = Chosen(**json.loads(args.inside))
        keep(chosen, run(chosen))
    else:
        sys.stdout.write(json.dumps(summary(measure(args, __file__, Chosen))) + "\n")


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The median speed of each variant, and the ratios between variants."""
    out = medians(results, "pairs")
    for theirs in ("trl", "trl_best"):
        if "packed" in results and theirs in results:
            a, b = results["packed"][-1], results[theirs][-1]
            out[f"packed_vs_{theirs}"] = {
                **{speed: out["packed"][speed] / out[theirs][speed] for speed in speeds("pairs")},
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


def make_examples(count: int) -> list[Any]:
    from vpo_ray.train.examples import Example

    return [Example(f"pair-{n:04}", *texts) for n, texts in enumerate(make_texts(count, 2))]


def make_dpo_worker(chosen: Chosen, pairs: int, rank: int = 0, workers: int = 1, **changes: Any) -> Any:
    from vpo_ray.recipe import Train

    settings = Train(**(settings_of(chosen) | changes))
    return make_worker(chosen, "dpo", settings, make_examples(pairs), rank, workers)


def run_ours(chosen: Chosen) -> dict[str, Any]:
    from vpo_ray.train import attention, packing

    if chosen.variant == "unshared":
        packing.pack = partial(packing.pack, share=False)
    if chosen.variant == "sdpa":
        attention.kernel_for = lambda query, dropout: attention.sdpa
    worker = make_dpo_worker(chosen, chosen.batch * chosen.steps)
    # The reference is computed once for all epochs; here one epoch pays for it in full.
    started = clocks()
    worker.reference = worker.compute_reference(chosen.variant)
    lines, times = timed_steps(worker, chosen.steps)
    speed = chosen.figures("pairs", started, times)
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


def run_trl(chosen: Chosen) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from vpo_ray.train.packing import batch

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    clock, times = step_clock()
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
    started = clocks()
    tokenizer = AutoTokenizer.from_pretrained(chosen.policy)
    trainer = Tokenised(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        peft_config=LoraConfig(r=chosen.lora, lora_alpha=2 * chosen.lora, target_modules="all-linear")
        if chosen.lora
        else None,
    )
    trainer.train()
    return {
        **chosen.figures("pairs", started, times),
        "losses": [line["loss"] for line in trainer.state.log_history if "grad_norm" in line],
        "weights": [] if chosen.lora else sample_weights(trainer.model),
    }


def run_zero(workers: int, chosen: Chosen) -> dict[str, Any]:
    """Bytes of parameters, gradients' partitions and optimizer state that the fullest rank holds."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(_zero_rank, (workers, chosen), workers)
    ranks = [
        json.loads(Path(chosen.folder, f"zero-{rank}.json").read_text("utf-8")) for rank in range(workers)
    ]
    return {"state_bytes": max(r["bytes"] for r in ranks), "losses": ranks[0]["losses"]}


def _zero_rank(rank: int, workers: int, chosen: Chosen) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    micro = chosen.batch // workers
    worker = make_dpo_worker(chosen, 2 * chosen.batch, rank, workers, zero_stage=3, micro_batch=micro)
    worker.reference = worker.compute_reference(chosen.variant)
    losses = [worker.step(step)["loss"] for step in range(2)]
    optimizer = worker.engine.optimizer
    held = [p.ds_tensor if p.ds_tensor is not None else p for p in worker.engine.module.parameters()]
    held += optimizer.fp32_partitioned_groups_flat
    held += [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    result = {"bytes": sum(t.numel() * t.element_size() for t in held), "losses": losses}
    Path(chosen.folder, f"zero-{rank}.json").write_text(json.dumps(result), "utf-8")


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
