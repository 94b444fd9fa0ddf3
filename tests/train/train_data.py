"""Rows and settings that the training tests share."""

from pathlib import Path
from typing import Any

from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Train
from vpo_ray.records import Row
from vpo_ray.train import PhaseSpec, TrainResult, train

TASK_PROMPT = read_prompt("builtin:policy")
ANIMALS = ("dog", "cat", "horse", "fox", "bird", "tiger", "wolf", "bear", "owl", "whale", "crab")


def pairs(count: int) -> list[Row]:
    """Distinct pairs whose queries and responses have different lengths."""
    return [
        {
            "pair_id": f"pair-{n:02}",
            "query_id": f"query-{n:02}",
            "query": f"a {ANIMALS[n % len(ANIMALS)]} runs" + " and rests" * (n % 4),
            "chosen": f"A {ANIMALS[n % len(ANIMALS)]} runs over green grass in the sun." * (1 + n % 3),
            "rejected": f"{ANIMALS[n % len(ANIMALS)]}, video" + ", fast" * (n % 5),
        }
        for n in range(count)
    ]


def sft_rows(count: int) -> list[Row]:
    return [{"query_id": p["query_id"], "query": p["query"], "prompt": p["chosen"]} for p in pairs(count)]


def settings(**changes: Any) -> Train:
    defaults = {
        "epochs": 1,
        "lr": 1e-3,
        "global_batch": 8,
        "micro_batch": 4,
        "max_length": 1024,
        "dtype": "float32",
        "zero_stage": 0,
        "use_gpu": False,
        "resources_per_worker": {"CPU": 0.5},
        "max_failures": 0,
    }
    return Train(**(defaults | changes))


# Of 23 rows 4 are held out: batches of 8, 8 and a rest of 3 that is uneven for two workers.
TWO_WORKERS = settings(
    epochs=4,
    global_batch=8,
    micro_batch=4,
    lr=3e-4,
    zero_stage=3,
    workers=2,
    save_steps=3,
    max_failures=2,
    evaluate={"share": 0.12, "steps": 4},
)
ROWS = 23

# The same weights, in time to be killed: Ray Train takes a checkpoint every two seconds.
OFTEN_SAVED = TWO_WORKERS.model_copy(update={"save_steps": 2})


def run(
    folder: Path, model: Path, chosen: Train, phase: Any = "dpo", rows: Any = None, images: str | None = None
) -> TrainResult:
    """A whole phase on the running Ray cluster; it leaves `folder/policy`."""
    spec = PhaseSpec(
        phase=phase,
        settings=chosen,
        model=str(model),
        task_prompt=TASK_PROMPT,
        out=str(folder / "policy"),
        run_uri=str(folder),
        seed=5,
        fingerprint="0123456789abcdef",
        images=images,
    )
    return train(spec, pairs(ROWS) if rows is None else rows)


# What `vpo.json` says of a policy that a test exports by itself.
FACTS: Row = {
    "phase": "dpo", "job": "j", "fingerprint": "f", "base_model": "base", "rows": 6, "held_out": 0,
    "dropped": {}, "steps": 2, "exported_step": 2, "metrics": {"loss": 0.5}, "warnings": [],
}  # fmt: skip
