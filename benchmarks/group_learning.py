"""`rl` against DPO in the small world, at an equal budget of rendered videos.

    make demo
    python benchmarks/group_learning.py                  # from the run that the demo left
    python benchmarks/group_learning.py --tuning --out runs/tuning --rl 'wide={clip: 0.5}'

Arms start from the run's SFT policy. `dpo` is the run's own; `rl` learns from the same table of feedback, of
all candidates where DPO takes pairs; `rl_part` from that of `--part` of the queries. Neither renders a video.
All are evaluated on the same held-out queries. `--tuning` trains an arm for each `--rl` and evaluates on
queries that are neither held out nor trained on, so that settings are not chosen by what they are measured
with. The last line is one JSON object; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from proof import RECIPE, fork

import vpo_ray
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import RunDir

# What of the recipe's dpo section rl has too; and its own: DPO's learning rate, and about as many responses.
SHARED = ("max_length", "dtype", "autocast", "zero_stage", "use_gpu", "resources_per_worker")
SETTINGS = {"epochs": 1, "lr": 2e-5, "global_batch": 2, "micro_batch": 2, "clip_high": 0.28}
SHOWN = ("ci_low", "ci_high", "n", "win", "loss", "p")
METRICS = ("truth", "truth.look", "reward", "verdict.aligned")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--run", type=Path, default=Path("runs/laptop"), help="that the recipe left")
    parser.add_argument("--out", type=Path, default=Path("runs/group_learning"))
    parser.add_argument("--queries", type=int, default=80, help="of the evaluation (%(default)s)")
    parser.add_argument("--part", type=float, default=0.6, help="of the queries, for rl_part; 0: without")
    parser.add_argument("--tuning", action="store_true", help="evaluate on queries that are not held out")
    parser.add_argument(
        "--rl", action="append", default=[], metavar="NAME={KEY: VALUE}", help="other settings"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    began = time.monotonic()
    arms = list(trained(given))
    evaluated = vpo_ray.evaluate(evaluation(given, arms))
    figures = {"videos": {"dpo": videos(given.run)} | {name: count for name, _, count in arms}}
    figures |= figures_of(evaluated.results)
    sys.stdout.write(json.dumps(figures | {"seconds": round(time.monotonic() - began)}) + "\n")


def trained(given: argparse.Namespace) -> Iterable[tuple[str, Path, int]]:
    """Each arm's name, run directory, and the videos that its learning took."""
    rows = RunDir(str(given.run)).table("feedback")
    scored = {row["query_id"]: 0 for row in rows.rows()}
    for row in rows.rows():
        scored[row["query_id"]] += row["score"] is not None
    for name, changes in settings(given).items():
        yield name, offline(given, name, changes), sum(scored.values())
    own = next(iter(settings(given).values()))
    if given.part and not given.tuning:
        queries = sorted(scored)[: round(given.part * len(scored))]
        yield "rl_part", offline(given, "rl_part", own, queries), sum(scored[query] for query in queries)


def settings(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each arm changes in SETTINGS; the first one's are those of rl_part too."""
    parts = [item.partition("=") for item in given.rl or ["rl={}"]]
    return {name: yaml.safe_load(text) for name, _, text in parts}


def offline(
    given: argparse.Namespace, name: str, changes: dict[str, Any], queries: list[str] | None = None
) -> Path:
    """Learn from the run's feedback, of some queries where they are given; the run directory."""
    out = given.out / name
    recipe = rl_recipe(given, out, changes)
    fork(vpo_ray.load_recipe(given.recipe, [f"out={given.run}", *given.set]), out)
    if not (out / "checkpoints/rl/vpo.json").exists():
        vpo_ray.train(recipe, "group")
        groups = RunDir(str(out)).table("groups")
        rows = list(groups.rows())
        groups.replace(row for row in rows if queries is None or row["query_id"] in queries)
        vpo_ray.train(recipe, "rl")
    return out


def rl_recipe(given: argparse.Namespace, out: Path, changes: dict[str, Any]) -> Recipe:
    """The recipe with `rl` in the place of `dpo` and its pairs."""
    own = vpo_ray.load_recipe(given.recipe, given.set)
    assert own.dpo is not None
    section = own.dpo.model_dump(mode="json", include=set(SHARED)) | SETTINGS | changes
    sets = ["dpo=null", "pair={}", f"rl={json.dumps(section)}", "evaluate.policies=[query, sft, rl]"]
    return vpo_ray.load_recipe(given.recipe, [*given.set, *sets, f"out={out}"])


def evaluation(given: argparse.Namespace, arms: list[tuple[str, Path, int]]) -> Recipe:
    """The recipe whose evaluation compares DPO and SFT with every arm; in a directory of its own."""
    out = arms[0][1]
    policies: dict[str, Any] = {"dpo": {"kind": "checkpoint", "path": f"{given.run}/checkpoints/dpo"}}
    policies |= {name: {"kind": "checkpoint", "path": f"{at}/checkpoints/rl"} for name, at, _ in arms}
    policies |= {} if given.tuning else {"sft": {"kind": "sft"}}
    own = vpo_ray.load_recipe(given.recipe, given.set)
    assert own.evaluate is not None
    path = own.evaluate.sets["held_out"].path
    if given.tuning:
        path = str(given.out / "tuning.jsonl")
        Path(path).write_text("".join(untouched(own, given.run)), "utf-8")
    sets = {"held_out": {"path": str(path), "size": given.queries}}
    recipe = rl_recipe(given, out, settings(given)[arms[0][0]])
    asked = recipe.evaluate
    assert asked is not None
    update = type(asked).model_validate(asked.model_dump() | {"policies": policies, "sets": sets})
    return recipe.model_copy(update={"evaluate": update})


def untouched(recipe: Recipe, run: Path) -> list[str]:
    """Lines of the recipe's file of queries that the run did not take."""
    taken = {row["query"] for row in RunDir(str(run)).table("queries").rows()}
    lines = Path(str(recipe.queries.path)).read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["query"] not in taken]


def videos(run: Path) -> int:
    """Videos that a run rendered to learn from."""
    return sum(row["video_key"] is not None for row in RunDir(str(run)).table("renders").rows())


def figures_of(results: dict[str, Any]) -> dict[str, Any]:
    """Every policy's figures, and what each is better by than DPO; with intervals."""
    of_policy = results["results"]["held_out"]["render"]
    against = [
        entry for entry in results["comparisons"] if entry["a"] == "dpo" and entry["metric"] in METRICS
    ]
    return {
        "policies": {
            name: {metric: interval(found[metric]) for metric in METRICS if metric in found}
            for name, found in of_policy.items()
        },
        "less_dpo": {
            name: {
                entry["metric"]: {"value": entry["difference"], **{key: entry[key] for key in SHOWN}}
                for entry in against
                if entry["b"] == name
            }
            for name in of_policy
            if name != "dpo"
        },
    }


def interval(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("value", "ci_low", "ci_high", "n")}


if __name__ == "__main__":
    main()
