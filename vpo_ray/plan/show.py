"""What a run will take, as text."""

from __future__ import annotations

import json
from collections import Counter

from vpo_ray.plan.check import check
from vpo_ray.recipe import Recipe
from vpo_ray.stages.curate import curate
from vpo_ray.storage import RunDir


def plan(recipe: Recipe) -> str:
    """A table of rows and replica-hours by stage; hours come from the run directory's own ledger."""
    check(recipe)
    read = Counter(row.get("split", "dropped") for _, row in curate(recipe.queries))
    queries = read["dpo"]
    measured = _seconds_per_row(RunDir(recipe.out))
    rows = queries * recipe.sample.k
    pools = {
        "sample": recipe.sample.pool,
        "judge": recipe.judge.pool,
        "render": recipe.render.pool,
        "score": recipe.reward.pool,
    }
    lines = [
        f"recipe      {recipe.name}, fingerprint {recipe.fingerprint()}",
        f"run         {recipe.out}",
        f"queries     {read.total():,} rows read, {read['dropped']:,} dropped, {queries:,} for feedback, "
        f"{recipe.sample.k} candidates each",
        "",
        f"{'stage':<8} {'rows, at most':>14} {'pool':>7} {'s a row':>9} {'replica-hours':>14} {'hours':>8}",
    ]
    for stage, pool in pools.items():
        size = "-".join(str(n) for n in dict.fromkeys(pool.size))
        seconds = measured.get(stage)
        if seconds is None:
            lines.append(
                f"{stage:<8} {rows:>14,} {size:>7} {'not measured yet: run a few queries first':>33}"
            )
        else:
            hours = rows * seconds / 3600
            cost = f"{seconds:>9.3f} {hours:>14.2f} {hours / pool.size[1]:>8.2f}"
            lines.append(f"{stage:<8} {rows:>14,} {size:>7} {cost}")
    shape = f"{recipe.render.frames} x {recipe.render.width} x {recipe.render.height}"
    lines += ["", f"videos      up to {rows:,} of {shape}, {recipe.render.steps} steps"]
    for phase in ("sft", "dpo"):
        settings = getattr(recipe, phase)
        if settings is not None:
            lines.append(
                f"{phase:<11} {settings.workers} worker(s), ZeRO-{settings.zero_stage}, "
                f"global batch {settings.global_batch}, lr {settings.lr:g}, {settings.epochs:g} epoch(s)"
            )
    return "\n".join(lines) + "\n"


def _seconds_per_row(run: RunDir) -> dict[str, float]:
    if not run.exists("ledger.json"):
        return {}
    stages = json.loads(run.read("ledger.json"))["stages"]
    return {name: stage["seconds_per_row"] for name, stage in stages.items() if stage.get("seconds_per_row")}
