"""Group-relative learning against TRL's GRPO trainer: the same policy, samples, rewards and batches.

    python benchmarks/group.py                        # the last line is one JSON object
    python benchmarks/group.py --group 8 --batch 8    # of other sizes

Both learn from samples that are there: one policy wrote all of them, and the steps of one epoch follow, each
over `--batch` groups of `--group` responses. Variants, each in its own process, with the policy and the texts
of `benchmarks/train.py`: `packed` is what `vpo_ray.train` does; `unshared` packs without sharing prompts;
`trl` is TRL's GRPOTrainer as it comes, `trl_best` the same without gradient checkpointing. TRL
gets the token ids from its `rollout_func` and the rewards from its `reward_funcs`, all in one generation, so
that it computes the log-probabilities of the policy that sampled once, as we do. Its samples are not
shuffled, so that its steps have the same groups as ours. A step is a batch at once on both sides.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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

VARIANTS = ("packed", "unshared", "trl_best", "trl")


@dataclass(frozen=True)
class ChosenGroups(Chosen):
    group: int = 4


def main() -> None:
    parser = arguments(__doc__, VARIANTS)
    parser.add_argument("--group", type=int, default=4, help="responses of a group (%(default)s)")
    args = parser.parse_args()
    if args.inside:
        chosen = ChosenGroups(**json.loads(args.inside))
        keep(chosen, (run_trl if chosen.variant.startswith("trl") else run_ours)(chosen))
    else:
        results = measure(args, __file__, partial(ChosenGroups, group=args.group))
        sys.stdout.write(json.dumps(summary(results)) + "\n")


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The median speed of each variant, and the ratios of ours to TRL's."""
    out = medians(results, "groups")
    for theirs in ("trl", "trl_best"):
        if "packed" in results and theirs in results:
            a, b = results["packed"][-1], results[theirs][-1]
            out[f"packed_vs_{theirs}"] = {
                **{speed: out["packed"][speed] / out[theirs][speed] for speed in speeds("groups")},
                "memory": a["gib"] / b["gib"],
                **{f"{name}_difference": apart(a[name], b[name]) for name in ("losses", "norms", "weights")},
            }
    return out


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The largest difference, as a share of the largest of theirs."""
    if not theirs:
        return None
    return max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) / max(map(abs, theirs))


def make_groups(chosen: ChosenGroups) -> tuple[list[Any], list[list[float]]]:
    """The groups of all steps as examples, and their rewards."""
    import numpy as np

    from vpo_ray.stages.group import advantages
    from vpo_ray.train.examples import Example

    texts = make_texts(chosen.batch * chosen.steps, chosen.group)
    rewards = np.random.default_rng(1).normal(size=(len(texts), chosen.group)).tolist()
    examples = [
        Example(f"group-{n:04}", *text, tuple(advantages(own, "group")))
        for n, (text, own) in enumerate(zip(texts, rewards, strict=True))
    ]
    return examples, rewards


def run_ours(chosen: ChosenGroups) -> dict[str, Any]:
    from vpo_ray.recipe import Rl
    from vpo_ray.train import packing

    if chosen.variant == "unshared":
        packing.pack = partial(packing.pack, share=False)
    worker = make_worker(chosen, "rl", Rl(**settings_of(chosen)), make_groups(chosen)[0])
    started = clocks()
    worker.reference = worker.compute_reference(chosen.variant)
    worker.sampled = worker.reference
    lines, times = timed_steps(worker, chosen.steps)
    return {
        **chosen.figures("groups", started, times),
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "weights": [] if chosen.lora else sample_weights(worker.engine.module.model),
    }


def run_trl(chosen: ChosenGroups) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    from vpo_ray.train.packing import batch

    os.environ.pop("LOCAL_RANK")
    size, steps = chosen.batch, chosen.steps
    examples, rewards = make_groups(chosen)
    order = [row for step in range(steps) for row in batch(step, len(examples), size, 0)]
    grpo_trainer.shuffle_sequence_dict = lambda samples: samples

    def places(prompts: Sequence[str]) -> list[tuple[int, int]]:
        """The group and the place in it that each row of a generation stands for."""
        seen: Counter[str] = Counter()
        found = []
        for prompt in prompts:
            found.append((int(prompt), seen[prompt]))
            seen[prompt] += 1
        return found

    def rollout(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [examples[n].prompt.tolist() for n, _ in places(prompts)],
            "completion_ids": [examples[n].responses[k].tolist() for n, k in places(prompts)],
            "logprobs": None,
        }

    def given(prompts: Sequence[str], **_: Any) -> list[float]:
        return [rewards[n][k] for n, k in places(prompts)]

    clock, times = step_clock()
    model = AutoModelForCausalLM.from_pretrained(
        chosen.policy, dtype=torch.bfloat16 if chosen.gpu and chosen.lora else torch.float32
    )
    config = GRPOConfig(
        output_dir=f"{chosen.folder}/{chosen.variant}",
        per_device_train_batch_size=size * chosen.group,
        num_generations=chosen.group,
        steps_per_generation=steps,
        max_steps=steps,
        shuffle_dataset=False,
        loss_type="bnpo",  # a mean over the batch's tokens, as our `aggregate: token`
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=chosen.gpu,
        use_cpu=not chosen.gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=chosen.variant == "trl",
    )
    started = clocks()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=given,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(chosen.policy),
        train_dataset=Dataset.from_list([{"prompt": str(row)} for row in order]),
        callbacks=[clock],
        rollout_func=rollout,
        peft_config=LoraConfig(r=chosen.lora, lora_alpha=2 * chosen.lora, target_modules="all-linear")
        if chosen.lora
        else None,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    return {
        **chosen.figures("groups", started, times),
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "weights": [] if chosen.lora else sample_weights(trainer.model),
    }


if __name__ == "__main__":
    main()
