"""How often prompts meet a profile: of the SFT policy that is asked for it, and after DPO under it.

    make demo
    python benchmarks/profiles.py          # from the SFT policy that the demo left

The SFT policy has learnt no profile. Half of the queries of a run are asked under one, `max_words`, the run's
pairs teach DPO, and both policies are sampled on held-out queries, asked under the profile and bare. No video
is rendered of a prompt that does not meet it. The last line is one JSON object; run again, it goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import vpo_ray
from vpo_ray.evaluation.statistics import share_interval

RECIPE = "jobs/recipes/laptop.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--sft", type=Path, default=Path("runs/laptop/checkpoints/sft"))
    parser.add_argument("--out", type=Path, default=Path("runs/profiles"))
    parser.add_argument("--words", type=int, default=30, help="of the profile, at most (%(default)s)")
    parser.add_argument("--queries", type=int, default=48, help="to learn from (%(default)s)")
    parser.add_argument("--held-out", type=int, default=80, help="queries (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    began = time.monotonic()
    learnt = recipe(given, "run", given.sft, 0.5, [f"queries.limit={given.queries}"])
    vpo_ray.run(learnt)
    policies = {"sft": given.sft, "dpo": Path(learnt.out) / "checkpoints/dpo"}
    found = {name: on_held_out(given, name, policy) for name, policy in policies.items()}
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began)}) + "\n")


def recipe(given: argparse.Namespace, name: str, policy: Path, share: float, sets: list[str]) -> Any:
    """The recipe, from a policy that is trained already, with the profile for a share of the queries."""
    profiles = {"short": {"share": share, "max_words": given.words}}
    own = ["sft=null", "evaluate=null", f"policy.model={policy}", f"profiles={json.dumps(profiles)}"]
    return vpo_ray.load_recipe(
        given.recipe, ["serve.example=false", *own, f"out={given.out / name}", *sets, *given.set]
    )


def on_held_out(given: argparse.Namespace, name: str, policy: Path) -> dict[str, Any]:
    """Shares of a policy's prompts of held-out queries, half of which are asked under the profile."""
    held_out = vpo_ray.load_recipe(given.recipe, given.set).evaluate.sets["held_out"].path
    sets = [
        "dpo=null",
        "pair={}",
        "sample.k=1",
        f"queries.path={held_out}",
        f"queries.limit={given.held_out}",
    ]
    asked = recipe(given, f"held_out-{name}", policy, 0.5, sets)
    vpo_ray.generate(asked, ["sample", "judge"])
    return shares(asked.out)


def shares(run: str) -> dict[str, Any]:
    """Of the prompts under the profile and of the bare ones: how many meet `max_words` (bare ones have none
    to meet), how long they are, and how many the judge calls aligned."""
    rows = vpo_ray.Run(run).table("verdicts", ["profile", "unmet", "prompt", "verdict", "error"]).to_pylist()
    found = {}
    for kind in ("short", None):
        some = [row for row in rows if row["profile"] == kind and row["error"] is None]
        met = sum(not row["unmet"] for row in some)
        aligned = sum(row["verdict"] == "aligned" for row in some)
        found[kind or "bare"] = {
            "prompts": len(some),
            "met": share(met, len(some)),
            "aligned": share(aligned, len(some)),
            "words": round(sum(len(row["prompt"].split()) for row in some) / max(1, len(some)), 1),
        }
    return found


def share(count: int, of: int) -> dict[str, float | None]:
    found = share_interval(count, of)
    return {name: getattr(found, name) for name in ("value", "low", "high")}


if __name__ == "__main__":
    main()
