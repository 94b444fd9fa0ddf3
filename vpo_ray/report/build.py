"""Build `report/index.html` of a run directory: `vpo report RECIPE`.

One static page: style, script and charts are inside it, videos are files beside it, and its content
security policy allows nothing else. All text of users and models is escaped by the template engine.
"""

from __future__ import annotations

from typing import Any

import yaml

from vpo_ray.loop.ledger import alarms, build_ledger, funnel, reconcile
from vpo_ray.recipe import Recipe
from vpo_ray.report.chart import charts
from vpo_ray.report.gallery import cards
from vpo_ray.report.page import render_page
from vpo_ray.stages.preview import told
from vpo_ray.storage.run_dir import RunDir

PAGE = "report/index.html"
SHOWN_GROUPS = 12
_LABELS = {
    "evolved": "evolved prompts",
    "targets": "SFT targets of them",
    "queries": "queries to sample",
    "candidates": "candidate prompts",
    "aligned": "judged aligned",
    "previews": "previews",
    "videos": "distinct videos",
    "pairs": "preference pairs",
    "groups": "groups of candidates",
}


def build_report(run: RunDir, recipe: Recipe) -> str:
    """Write the page (and the videos it shows, where their store is outside the run); returns its path.

    It can be made at any time: of a run that has just begun, that was stopped, or that found nothing.

    Raises:
        StorageError: the run directory cannot be read or written.
    """
    ledger = build_ledger(run, recipe)
    page = render_page(
        "report.html",
        ["report.css"],
        ["report.js"],
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
        fingerprint=ledger["fingerprint"],
        versions=_json(run, "versions.json", {}),
        stages=ledger["stages"],
        funnel=_funnel(funnel(ledger)),
        probe=told(probe) if (probe := ledger["stages"].get("preview", {}).get("probe")) else None,
        alarms=alarms(ledger),
        imbalances=reconcile(ledger),
        reasons=_reasons(ledger["stages"]),
        charts=charts({phase: run.metrics(phase) for phase in ("sft", "dpo", "rl")}),
        example=_json(run, "example.json", None),
        cards=cards(run, recipe),
        groups=_groups(run),
    )
    run.write(PAGE, page)
    return run.at(PAGE)


def _groups(run: RunDir) -> list[dict[str, Any]]:
    """The first groups by their ids: the query, and (reward, prompt) of each candidate, the best first."""
    rows = sorted(
        run.table("groups").rows(["group_id", "query", "prompts", "rewards"]), key=lambda r: r["group_id"]
    )
    return [
        {
            "query": row["query"],
            "candidates": sorted(zip(row["rewards"], row["prompts"], strict=True), reverse=True),
        }
        for row in rows[:SHOWN_GROUPS]
    ]


def _json(run: RunDir, name: str, default: Any) -> Any:
    return run.read_json(name) if run.exists(name) else default


def _funnel(counts: dict[str, int]) -> list[dict[str, Any]]:
    """Steps with the width of their bar (percent of the widest) and the share of the step before."""
    widest = max(counts.values()) or 1
    steps: list[dict[str, Any]] = []
    for key, count in counts.items():
        before = steps[-1]["count"] if steps else 0
        share = f"{count / before:.0%}" if key in ("aligned", "videos") and before else ""
        if key == "candidates" and before:
            share = f"{count / before:.3g} a query"
        if key == "pairs" and counts["queries"]:
            share = f"{count / counts['queries']:.2g} a query"
        steps.append(
            {"label": _LABELS[key], "count": count, "width": round(100 * count / widest, 2), "share": share}
        )
    return steps


def _reasons(stages: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    """Stage, what happened, reason, rows: for every row that did not go on."""
    kinds = {"errored": "error", "dropped": "dropped", "skipped": "skipped"}
    return [
        (stage, label, reason, count)
        for stage, entry in stages.items()
        for kind, label in kinds.items()
        for reason, count in entry[kind].items()
    ]
