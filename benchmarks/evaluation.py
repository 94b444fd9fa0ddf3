"""Figures of an evaluation from stored samples: time and memory, and the same intervals by SciPy.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --policies 12 --queries 5000

Samples of made-up policies are written as a table, read back and turned into the content of results.json, in
a process of its own: shares, means and intervals by 10,000 resamples, the tests of every policy against the
first one, signs. Beside it, what `scipy.stats.bootstrap` takes for one such interval, times their number. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from scipy import stats

from vpo_ray.evaluation.figures import results_of
from vpo_ray.evaluation.samples import SAMPLE
from vpo_ray.recipe import Evaluation
from vpo_ray.records import VERDICTS, Row, content_id, query_id
from vpo_ray.storage.tables import Table

MEASURES = ("reward", "clip", "aesthetic", "flickering")
LIMIT_S, LIMIT_MB = 60, 2000

log = logging.getLogger("evaluation")


def samples(policies: int, queries: int) -> list[Row]:
    """One sample a policy and query; one in 50 has no video."""
    rng = random.Random(0)
    rows = []
    for policy in range(policies):
        for number in range(queries):
            query = f"query {number}"
            made = rng.random() > 0.02
            scores = [(name, rng.gauss(policy / 20, 1)) for name in MEASURES] if made else []
            row = {
                **dict.fromkeys(SAMPLE.names),
                "sample_id": content_id(policy, number),
                "set": "eval",
                "policy": f"policy-{policy}",
                "video_model": "render",
                "query_id": query_id(query),
                "query": query,
                "seed": 0,
                "prompt": " ".join(rng.choices(("a", "cat", "on", "the", "roof", "at", "night"), k=60)),
                "verdict": rng.choices(VERDICTS, (92, 2, 5, 1))[0],
                "video_key": content_id("video", policy, number) if made else None,
                "error": None if made else "CUDA out of memory",
                "error_stage": None if made else "render",
                "measures": [{"name": name, "value": value} for name, value in scores],
            }
            rows.append(row)
    return rows


def figures(folder: str, policies: int) -> dict[str, Any]:
    """Seconds and peak memory of this process, and how many intervals were computed."""
    start = time.perf_counter()
    rows = list(Table(folder, SAMPLE, "sample_id").rows())
    read = time.perf_counter() - start
    names = [f"policy-{number}" for number in range(policies)]
    kinds = ("base", "sft", "dpo")
    context = {
        "policies": {
            name: {"kind": kinds[n] if n < 3 else "checkpoint", "identity": name}
            for n, name in enumerate(names)
        },
        "sets": {"eval": {"hash": "-"}},
        "video_models": {"render": "-"},
    }
    results = results_of(rows, [], Evaluation(), context)
    seconds = time.perf_counter() - start
    return {
        "samples": len(rows),
        "read_s": round(read, 2),
        "seconds": round(seconds, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "bootstraps": len(MEASURES) * policies + len(results["comparisons"]),
    }


def scipy_seconds(queries: int) -> float:
    """Of one interval, 10,000 resamples, a percentile bootstrap as ours."""
    values = np.random.default_rng(0).normal(size=queries)
    start = time.perf_counter()
    stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", vectorized=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an evaluation's figures.")
    parser.add_argument("--policies", type=int, default=6)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    if args.inside:
        sys.stdout.write(json.dumps(figures(args.inside, args.policies)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        Table(folder, SAMPLE, "sample_id").append(samples(args.policies, args.queries))
        command = [sys.executable, __file__, "--inside", folder, "--policies", str(args.policies)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    one = scipy_seconds(args.queries)
    log.info("%s; one interval by SciPy: %.3f s", result, one)
    result |= {
        "policies": args.policies,
        "queries": args.queries,
        "scipy_s": round(one * result["bootstraps"], 2),
        "times_faster": round(one * result["bootstraps"] / result["seconds"], 2),
        "within_limits": result["seconds"] < LIMIT_S and result["peak_mb"] < LIMIT_MB,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
