"""What the demo learns, over seeds: truth of the query itself, after SFT and after DPO, and what it took.

    vpo world runs/world
    python benchmarks/learning.py --seeds 10
    python benchmarks/learning.py --strategies all adaptive previews
    python benchmarks/learning.py --transfer

Each seed and strategy is a run of its own in `--out`, made by the recipe of `make demo`; run again, it goes
on where it stopped. Truth is the share of what a query names that a detector sees, one whole thing and a
clear look, from 0 to 1. Videos per point: those that a run renders in full to train, over 100 × the truth
gained from SFT to DPO. With `--transfer` the same prompts are rendered by the world's other video model, too,
which no policy was trained for. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from proof import other_video

import vpo_ray
from vpo_ray.cli import console
from vpo_ray.evaluation.evaluate import Evaluated
from vpo_ray.evaluation.pooled import pool_evaluations
from vpo_ray.storage.run_dir import RunDir

RECIPE = "jobs/recipes/laptop.yaml"
POLICIES = ("query", "sft", "dpo")
# Previews have a third of the steps; the best and the worst of a query are rendered in full.
STRATEGIES = {
    "all": "render.strategy=all",
    "adaptive": "render.strategy=adaptive",
    "previews": "render.preview={steps: 2, keep: 2, agreement: 0.5}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--strategies", nargs="+", default=["all"], choices=list(STRATEGIES))
    parser.add_argument("--transfer", action="store_true", help="render by another video model, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    # As the commands do: a line every half minute, and nothing of what libraries say to each other.
    console.forgive()
    console.log_to_stderr()
    print(json.dumps({name: of_strategy(name, given) for name in given.strategies}))  # noqa: T201


def of_strategy(strategy: str, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of all seeds with one strategy of rendering."""
    runs, evaluations = [], []
    for seed in range(given.first, given.first + given.seeds):
        out = given.out / f"{strategy}-{seed}"
        sets = [f"out={out}", f"seed={seed}", STRATEGIES[strategy], *given.set]
        recipe = vpo_ray.load_recipe(given.recipe, sets)
        if given.transfer:
            sets.append(f"evaluate.transfer.other={json.dumps(other_video(recipe))}")
            recipe = vpo_ray.load_recipe(given.recipe, sets)
        began = time.monotonic()
        run, evaluation = vpo_ray.run(recipe), vpo_ray.evaluate(recipe)
        runs.append(of_run(run, evaluation) | {"seed": seed, "wall_s": round(time.monotonic() - began)})
        evaluations.append(evaluation)
        print(json.dumps(runs[-1]), flush=True)  # noqa: T201
    assert recipe.evaluate is not None
    pooled = pool_evaluations(evaluations, recipe.evaluate, RunDir(str(given.out / strategy)))
    gained = 100 * (_figure(pooled, "dpo")["value"] - _figure(pooled, "sft")["value"])
    videos = sum(run["videos"] for run in runs) / len(runs)
    models = {"truth": "render", **({"truth_by_other": "other"} if given.transfer else {})}
    return {
        "seeds": runs,
        **{key: {name: _figure(pooled, name, model) for name in POLICIES} for key, model in models.items()},
        "raw < sft < dpo": f"{sum(run['in_order'] for run in runs)} of {len(runs)}",
        "videos_per_point": round(videos / gained, 1) if gained > 0 else None,
    }


def of_run(run: vpo_ray.Run, evaluation: Evaluated) -> dict[str, Any]:
    """Truth by policy, the videos that training took, and seconds by phase."""
    truth = {name: round(_figure(evaluation, name)["value"], 3) for name in POLICIES}
    did = run.ledger.get("last_run", {})
    return {
        "truth": truth,
        "in_order": truth["query"] < truth["sft"] < truth["dpo"],
        "videos": sum(
            row["video_key"] is not None for row in run.table("renders", ["video_key"]).to_pylist()
        ),
        "run_s": did.get("wall_seconds"),
        "phase_s": did.get("phases"),
    }


def _figure(evaluation: Evaluated, policy: str, video_model: str = "render") -> dict[str, Any]:
    found = evaluation.results["results"]["held_out"][video_model][policy]["truth"]
    return {key: found[key] for key in ("value", "ci_low", "ci_high") if key in found}


if __name__ == "__main__":
    main()
