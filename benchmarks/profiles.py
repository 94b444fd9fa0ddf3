"""How often prompts meet a profile: of an SFT policy that is asked for it, and after DPO under it.

    make demo
    python benchmarks/profiles.py          # from the SFT policy that the demo left

The SFT policy has learnt no profile. Half of the queries of a run are asked under one, `max_words`; its pairs
teach DPO. Then both policies are evaluated on held-out queries, asked under the profile and bare. The last
line is one JSON object; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import vpo_ray
from vpo_ray.recipe import Recipe

RECIPE = "jobs/recipes/laptop.yaml"
METRICS = ("prompt.profile_met", "prompt.words", "truth", "reward", "verdict.aligned")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--sft", type=Path, default=Path("runs/laptop/checkpoints/sft"))
    parser.add_argument("--out", type=Path, default=Path("runs/profiles"))
    parser.add_argument("--words", type=int, default=30, help="of the profile, at most (%(default)s)")
    parser.add_argument("--queries", type=int, default=48, help="to learn from (%(default)s)")
    parser.add_argument("--held-out", type=int, default=60, help="queries (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    began = time.monotonic()
    recipe = learning(given)
    vpo_ray.run(recipe)
    found = {profile or "bare": evaluated(given, recipe, profile) for profile in ("short", None)}
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began)}) + "\n")


def learning(given: argparse.Namespace) -> Recipe:
    """The recipe, from a policy that is trained already, with the profile for half of the queries."""
    profiles = {"short": {"share": 0.5, "max_words": given.words}}
    own = ["sft=null", f"policy.model={given.sft}", f"profiles={json.dumps(profiles)}", f"out={given.out}"]
    return vpo_ray.load_recipe(given.recipe, [*own, f"queries.limit={given.queries}", *given.set])


def evaluated(given: argparse.Namespace, recipe: Recipe, profile: str | None) -> dict[str, Any]:
    """Figures of both policies by name, and of DPO less SFT; with intervals."""
    asked = recipe.evaluate
    assert asked is not None
    policies = {"sft": {"kind": "checkpoint", "path": str(given.sft)}, "dpo": {"kind": "dpo"}}
    sets = {"held_out": {"path": asked.sets["held_out"].path, "size": given.held_out}}
    changed = asked.model_dump() | {"policies": policies, "sets": sets, "profile": profile}
    settings = type(asked).model_validate(changed)
    results = vpo_ray.evaluate(recipe.model_copy(update={"evaluate": settings})).results
    return {
        "policies": {
            name: {metric: interval(of[metric]) for metric in METRICS if metric in of}
            for name, of in results["results"]["held_out"]["render"].items()
        },
        "dpo_less_sft": {
            entry["metric"]: {"difference": entry["difference"]}
            | {key: entry[key] for key in ("ci_low", "ci_high", "win", "loss", "p")}
            for entry in results["comparisons"]
            if entry["metric"] in METRICS
        },
    }


def interval(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("value", "ci_low", "ci_high", "n")}


if __name__ == "__main__":
    main()
