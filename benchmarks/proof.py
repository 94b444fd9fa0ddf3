"""The table of the paper in small: `make proof`, or `python benchmarks/proof.py`.

For each seed the whole loop in the small world, two rounds of it, and DPO again without one kind of pairs;
then every policy on held-out queries, rendered by the world's video model and by another one, which was
trained on captions of another style (transfer). Ablations take the queries, candidates, scores and the SFT
policy of the seed's run, so that they differ in their pairs only. Run again, it goes on where it stopped.
The world comes first: `vpo world runs/world`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import vpo_ray
from vpo_ray.cli import console
from vpo_ray.evaluation.evaluate import Evaluated
from vpo_ray.evaluation.pooled import pool_evaluations
from vpo_ray.evaluation.results_table import table_text
from vpo_ray.recipe import Recipe
from vpo_ray.report.evaluation_page import write_evaluation_page
from vpo_ray.storage.run_dir import RunDir

RECIPE = "jobs/recipes/laptop.yaml"
# Pairs that a run goes without, by the policy's name.
ABLATIONS = {"no_text": "pair.text_per_query=0", "no_video": "pair.video_per_query=0"}
# What DPO makes of a run, and what was made of that.
_MADE = (
    "pairs", "reasons.json", "reference", "dpo", "dpo.jsonl", "example.json", "evaluation", "evaluation.json",
    "rounds", "recipe.yaml", "ledger.json", "report.html", "index.html", "videos", "lock",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--queries", type=int, default=200, help="of the training")
    parser.add_argument("--held-out", type=int, default=150, help="queries of the evaluation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    # As the commands do: a line every half minute, and nothing of what libraries say to each other.
    console.forgive()
    console.log_to_stderr()
    began, seconds = time.monotonic(), {}
    evaluations = []
    for seed in range(1, given.seeds + 1):
        sets = [f"queries.limit={given.queries}", f"seed={seed}", "dpo.epochs=1", *given.set]
        evaluations.append(prove(given.recipe, given.out / f"seed-{seed}", sets, given.held_out, seconds))
    asked = vpo_ray.Run(given.out / "seed-1").recipe.evaluate
    assert asked is not None
    found = pool_evaluations(evaluations, asked, RunDir(str(given.out)))
    write_evaluation_page(found.results, found.samples(), [], found.folder)
    seconds["all"] = time.monotonic() - began
    figures = {name: round(value) for name, value in seconds.items()}
    sys.stdout.write(f"{table_text(found.results)}\n{json.dumps({'seconds': figures})}\n")


def prove(recipe: str, out: Path, sets: list[str], held_out: int, seconds: dict[str, float]) -> Evaluated:
    """One seed: the loop, its ablations, and the evaluation of all."""

    def timed(name: str, began: float) -> None:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began

    loop = vpo_ray.load_recipe(recipe, [*sets, f"out={out}"])
    began = time.monotonic()
    vpo_ray.run(loop, rounds=2)
    timed("two rounds", began)
    for name, change in ABLATIONS.items():
        other = vpo_ray.load_recipe(recipe, [*sets, f"out={out}-{name}", change])
        began = time.monotonic()
        fork(loop, Path(f"{out}-{name}"))
        vpo_ray.train(other)
        timed(name, began)
    policies = evaluated_policies(loop, out)
    asked = vpo_ray.load_recipe(
        recipe,
        [
            *sets,
            f"out={out}",
            f"evaluate.policies={json.dumps(policies)}",
            f"evaluate.sets.held_out.size={held_out}",
            f"evaluate.transfer.other={json.dumps(other_video(loop))}",
        ],
    )
    began = time.monotonic()
    found = vpo_ray.evaluate(asked)
    timed("evaluation", began)
    return found


def evaluated_policies(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The rows of the table, by name."""
    assert recipe.sft is not None
    base = {"model": recipe.policy.model, "engine": recipe.sample.engine.model_dump(exclude_defaults=True)}
    shown = {
        "kind": "few_shot",
        "examples": recipe.sft.data,
        "llm": base,
        "max_tokens": recipe.sample.max_tokens,
    }
    ablations = {name: {"kind": "checkpoint", "path": f"{out}-{name}/checkpoints/dpo"} for name in ABLATIONS}
    return {
        "query": {"kind": "query"},
        "few_shot": shown,
        "sft": {"kind": "sft"},
        **ablations,
        "dpo": {"kind": "dpo"},
        "two_rounds": {"kind": "dpo", "round": 2},
        "dpo_twice": {"kind": "dpo", "times": 2},
    }


def other_video(recipe: Recipe) -> dict[str, Any]:
    """The render section with the world's other video model."""
    assert recipe.render.model is not None
    render = recipe.render.model_dump(mode="json", exclude_unset=True)
    return {**render, "model": str(Path(recipe.render.model).with_name("other_video"))}


def fork(recipe: Recipe, target: Path) -> None:
    """A run directory with what another has up to its scores. Files that are never changed are shared."""
    if (target / "versions.json").exists():
        return
    shutil.copytree(recipe.out, target, copy_function=os.link, ignore=shutil.ignore_patterns(*_MADE))


if __name__ == "__main__":
    main()
