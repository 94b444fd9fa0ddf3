"""How busy rounds keep the render pool: the next round made beside the training, or after it.

    python benchmarks/rounds.py

Rounds, streams, pools and tables are the product's own. What would need models sleeps, as in stream.py, and
so does the training. Ray's processes are started beforehand, as there. It takes 20 minutes. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from stream import COSTS, POOLS, cluster, prepare, put_to_sleep, read_naps, span, warm_up

from vpo_ray.loop import phases
from vpo_ray.loop.policies import Start
from vpo_ray.loop.rounds import run_rounds
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import CURATED, RunDir

log = logging.getLogger("rounds")


def sleeping_training(recipe: Recipe, run: RunDir, start: Start, *, seconds: float) -> str:
    """In place of training: it takes its time and leaves a checkpoint's marker."""
    if not run.exists("checkpoints/dpo/vpo.json"):
        time.sleep(seconds)
        run.write_json("checkpoints/dpo/vpo.json", {"rows": 0, "dropped": {}, "steps": 0})
    return run.at("checkpoints/dpo")


def execution(arguments: argparse.Namespace, overlap: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        naps = Path(folder) / "naps"
        naps.mkdir()
        put_to_sleep(str(naps), arguments.seconds / COSTS["render"])
        sets = ["sft=null", "evaluate=null", f"dpo.overlap={str(overlap).lower()}"]
        recipe, run = prepare(f"{folder}/run", arguments.queries, sets)
        run.write_json(CURATED, {"queries": arguments.queries, "dropped": 0})
        phases._learn = partial(sleeping_training, seconds=arguments.training)
        phases.prepare_feedback = lambda recipe, run: 0
        phases.write_example = lambda recipe, run, policy: None
        warm_up()
        run_rounds(recipe, arguments.rounds)
        renders = read_naps(naps, "render")
    rendering = sum(end - start for start, end in renders)
    return {
        "renders": len(renders),
        "span_s": round(span(renders), 1),
        "render_busy": round(rendering / (POOLS["render"] * span(renders)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--queries", type=int, default=104, help="of each round, 4 candidates each (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a render (%(default)s)")
    parser.add_argument(
        "--training", type=float, default=60.0, help="seconds of a round's training (%(default)s)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    result: dict[str, Any] = vars(arguments).copy()
    with cluster():
        for name, overlap in (("one_after_another", False), ("overlapped", True)):
            result[name] = execution(arguments, overlap)
            log.info("%s: %s", name, result[name])
    spans = (result[name]["span_s"] for name in ("overlapped", "one_after_another"))
    result["span_ratio"] = round(next(spans) / next(spans), 3)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
