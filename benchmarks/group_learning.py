"""`rl` against DPO in the small world, at an equal budget of rendered videos.

    make demo
    python benchmarks/group_learning.py                  # from the run that the demo left
    python benchmarks/group_learning.py --tuning --out runs/tuning --rl 'wide={clip: 0.5}'
    python benchmarks/group_learning.py --rounds 2 --out runs/rounds

Arms start from the run's SFT policy. `dpo` is the run's own; `rl` learns from the same table of feedback, of
all candidates where DPO takes pairs; `rl_part` from that of `--part` of the queries. Neither renders a video.
All are evaluated on the same held-out queries. `--tuning` trains an arm for each `--rl` and evaluates on
queries that are neither held out nor trained on, so that settings are not chosen by what they are measured
with. `--rounds` goes on with both from the run's scores: each round samples from its own policy, renders and
learns; every round's policy is evaluated (`dpo` and `rl` are the last, `dpo_1` and `rl_1` the first). The
last line is one JSON object; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    parser.add_argument("--rounds", type=int, default=1, help="of each, in place of one offline phase")
    parser.add_argument("--tuning", action="store_true", help="evaluate on queries that are not held out")
    parser.add_argument(
        "--rl", action="append", default=[], metavar="NAME={KEY: VALUE}", help="other settings"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    given = parser.parse_args()
    began = time.monotonic()
    arms = list(in_rounds(given) if given.rounds > 1 else trained(given))
    evaluated = vpo_ray.evaluate(evaluation(given, arms))
    figures: dict[str, Any] = {"videos": {arm.name: arm.videos for arm in arms}}
    figures |= figures_of(evaluated.results)
    sys.stdout.write(json.dumps(figures | {"seconds": round(time.monotonic() - began)}) + "\n")


@dataclass(frozen=True)
class Arm:
    """A policy that is evaluated, and the videos that were rendered to train it."""

    name: str
    checkpoint: Path
    videos: int


def trained(given: argparse.Namespace) -> Iterator[Arm]:
    """The run's own policy, and those that learnt from its feedback."""
    yield Arm("dpo", given.run / "checkpoints/dpo", videos(given.run))
    rows = RunDir(str(given.run)).table("feedback")
    scored = {row["query_id"]: 0 for row in rows.rows()}
    for row in rows.rows():
        scored[row["query_id"]] += row["score"] is not None
    for name, changes in settings(given).items():
        yield Arm(name, offline(given, name, changes), sum(scored.values()))
    if given.part and not given.tuning:
        queries = sorted(scored)[: round(given.part * len(scored))]
        checkpoint = offline(given, "rl_part", own_settings(given), queries)
        yield Arm("rl_part", checkpoint, sum(scored[query] for query in queries))


def in_rounds(given: argparse.Namespace) -> Iterator[Arm]:
    """The policy of each round of DPO, the last one first, and then those of `rl`. Both go on from what the
    run has up to its scores."""
    own = vpo_ray.load_recipe(given.recipe, [f"out={given.run}", *given.set])
    recipes = {
        "dpo": vpo_ray.load_recipe(given.recipe, [*given.set, f"out={given.out / 'dpo'}"]),
        "rl": rl_recipe(given, given.out / "rl", own_settings(given)),
    }
    for learns, recipe in recipes.items():
        fork(own, Path(recipe.out))
        vpo_ray.run(recipe, rounds=given.rounds)
        rendered, arms = 0, []
        for number in range(1, given.rounds + 1):
            run = Path(recipe.out, *(("rounds", str(number)) if number > 1 else ()))
            rendered += videos(run)
            name = learns if number == given.rounds else f"{learns}_{number}"
            arms.append(Arm(name, run / "checkpoints" / learns, rendered))
        yield from reversed(arms)


def settings(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each arm changes in SETTINGS."""
    parts = [item.partition("=") for item in given.rl or ["rl={}"]]
    return {name: yaml.safe_load(text) for name, _, text in parts}


def own_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The first arm's: those of rl_part, and of rounds."""
    return next(iter(settings(given).values()))


def offline(
    given: argparse.Namespace, name: str, changes: dict[str, Any], queries: list[str] | None = None
) -> Path:
    """Learn from the run's feedback, of some queries where they are given; the checkpoint."""
    out = given.out / name
    recipe = rl_recipe(given, out, changes)
    fork(vpo_ray.load_recipe(given.recipe, [f"out={given.run}", *given.set]), out)
    if not (out / "checkpoints/rl/vpo.json").exists():
        vpo_ray.train(recipe, "group")
        groups = RunDir(str(out)).table("groups")
        rows = list(groups.rows())
        groups.replace(row for row in rows if queries is None or row["query_id"] in queries)
        vpo_ray.train(recipe, "rl")
    return out / "checkpoints/rl"


def rl_recipe(given: argparse.Namespace, out: Path, changes: dict[str, Any]) -> Recipe:
    """The recipe with `rl` in the place of `dpo` and its pairs."""
    own = vpo_ray.load_recipe(given.recipe, given.set)
    assert own.dpo is not None
    section = own.dpo.model_dump(mode="json", include=set(SHARED)) | SETTINGS | changes
    sets = ["dpo=null", "pair={}", f"rl={json.dumps(section)}", "evaluate.policies=[query, sft, rl]"]
    return vpo_ray.load_recipe(given.recipe, [*given.set, *sets, f"out={out}"])


def evaluation(given: argparse.Namespace, arms: list[Arm]) -> Recipe:
    """The recipe whose evaluation compares SFT and every arm; in the directory of the first `rl`."""
    policies = {arm.name: {"kind": "checkpoint", "path": str(arm.checkpoint)} for arm in arms}
    policies |= {} if given.tuning else {"sft": {"kind": "sft"}}
    own = vpo_ray.load_recipe(given.recipe, given.set)
    assert own.evaluate is not None
    path = own.evaluate.sets["held_out"].path
    if given.tuning:
        path = str(given.out / "tuning.jsonl")
        Path(path).write_text("".join(untouched(own, given.run)), "utf-8")
    sets = {"held_out": {"path": str(path), "size": given.queries}}
    name = "rl" if given.rounds > 1 else next(iter(settings(given)))
    recipe = rl_recipe(given, given.out / name, settings(given).get(name, {}))
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
