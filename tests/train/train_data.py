"""Rows and settings that the training tests share."""

from typing import Any

from vpo_ray.policy_prompt import read_prompt
from vpo_ray.recipe import Train
from vpo_ray.records import Row

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
