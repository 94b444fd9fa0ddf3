"""Samples of evaluations, made up for the tests of their figures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from vpo_ray.records import VERDICTS, Row, content_id, query_id

Measures = Mapping[str, float | None]


def sample(
    policy: str,
    query: str,
    measures: Measures | None = None,
    seed: int = 0,
    set: str = "eval",
    video_model: str = "render",
    **more: Any,
) -> Row:
    """A finished sample, with a prompt, a verdict and a video unless `more` says otherwise."""
    place = (set, policy, video_model, query, seed)
    given = [{"name": name, "value": value} for name, value in (measures or {}).items() if value is not None]
    return {
        "sample_id": content_id(*place),
        "set": set,
        "category": None,
        "policy": policy,
        "video_model": video_model,
        "query_id": query_id(query),
        "query": query,
        "unsafe": None,
        "seed": seed,
        "prompt": f"{query}, by {policy}",
        "verdict": "aligned",
        "critique": None,
        "video_key": content_id("video", *place),
        "video_uri": None,
        "skipped": None,
        "error": None,
        "error_stage": None,
        "measures": given,
        **more,
    }


def answer(a: str, b: str, query: str, given: str | None, **more: Any) -> Row:
    """An LLM's answer, or a vote."""
    return {
        "comparison_id": content_id(a, b, query, sorted(more.items())),
        "set": "eval",
        "what": "video",
        "by": "judge",
        "video_model": "render",
        "query_id": query_id(query),
        "query": query,
        "seed": 0,
        "a": a,
        "b": b,
        "answer": given,
        "raw": None,
        "error": None,
        **more,
    }


def context(*policies: str, **more: Any) -> dict[str, Any]:
    return {
        "id": "e1",
        "name": "test",
        "date": "2026-11-28",
        "sets": {"eval": {"n": 0, "hash": "h", "kind": "file"}},
        "policies": {name: {"kind": name, "identity": f"id of {name}"} for name in policies},
        "video_models": {"render": "tiny"},
        **more,
    }


def noisy(
    policies: Sequence[str],
    queries: int,
    seeds: int = 1,
    measures: Sequence[str] = ("reward", "clip"),
    failing: float = 0.1,
) -> list[Row]:
    """Samples with failures, unsafe ones that are not rendered, NaN scores and ties."""
    rng = random.Random(0)
    rows = []
    for at, policy in enumerate(policies):
        for number in range(queries):
            query = f"a cat, number {number}"
            for seed in range(seeds):
                verdict = rng.choices((*VERDICTS, None), (90, 3, 4, 2, 1))[0]
                scores: dict[str, float | None] = {
                    name: round(rng.gauss(0.1 * at, 1), 1) for name in measures
                }
                scores["prompt.words"] = float(rng.randrange(20, 60))
                if number % 3 == 0:
                    scores["prompt.required_kept"] = float(rng.random() < 0.8)
                more: dict[str, Any] = {"verdict": verdict}
                if rng.random() < failing:
                    kind = rng.randrange(3)
                    scores = {k: v for k, v in scores.items() if k.startswith("prompt.")}
                    if kind == 0:
                        more |= {"error": f"CUDA error {rng.random()}", "error_stage": "render"}
                        more |= {"video_key": None}
                    elif kind == 1:
                        more |= {"skipped": "unsafe: not rendered", "video_key": None}
                    else:
                        scores |= dict.fromkeys(measures, float("nan"))
                rows.append(sample(policy, query, scores, seed, **more))
    return rows
