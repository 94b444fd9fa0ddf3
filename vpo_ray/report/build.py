"""Build `report/index.html` of a run directory: `vpo report RECIPE`.

One static page: style, script and charts are inside it, videos are files beside it, and its content
security policy allows nothing else. All text of users and models is escaped by the template engine.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vpo_ray.loop.ledger import alarms, build_ledger, funnel, reconcile
from vpo_ray.recipe import Recipe
from vpo_ray.report.chart import charts
from vpo_ray.report.gallery import cards
from vpo_ray.storage.run_dir import RunDir

_HERE = Path(__file__).parent
PAGE = "report/index.html"
_LABELS = {
    "queries": "queries to sample",
    "candidates": "candidate prompts",
    "aligned": "judged aligned",
    "videos": "distinct videos",
    "pairs": "preference pairs",
}


def build_report(run: RunDir, recipe: Recipe) -> str:
    """Write the page (and the videos it shows, where their store is outside the run); returns its path.

    It can be made at any time: of a run that has just begun, that was stopped, or that found nothing.

    Raises:
        StorageError: the run directory cannot be read or written.
    """
    ledger = build_ledger(run, recipe)
    style, script = ((_HERE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "number": _number, "seconds": _seconds}
    page = environment.get_template("report.html").render(
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
        fingerprint=ledger["fingerprint"],
        versions=_json(run, "versions.json", {}),
        stages=ledger["stages"],
        funnel=_funnel(funnel(ledger)),
        alarms=alarms(ledger),
        imbalances=reconcile(ledger),
        reasons=_reasons(ledger["stages"]),
        charts=charts({phase: run.metrics(phase) for phase in ("sft", "dpo")}),
        example=_json(run, "example.json", None),
        cards=cards(run, recipe),
        style=style,
        script=script,
        policy=_policy(style, script),
    )
    run.write(PAGE, page.encode("utf-8"))
    return run.at(PAGE)


def _policy(style: str, script: str) -> str:
    """A content security policy for a page without a server: our style, our script, videos by file."""
    sources = {"style-src": _hash(style), "script-src": _hash(script), "media-src": "'self' file:"}
    listed = "; ".join(f"{name} {value}" for name, value in sources.items())
    return f"default-src 'none'; {listed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


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


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    """Seconds for a reader: 0.045 s, 12.3 s, 4 min, 2.5 h."""
    if value is None:
        return ""
    if value < 120:
        return f"{value:.3g}\u202fs"
    return f"{value / 60:.3g}\u202fmin" if value < 7200 else f"{value / 3600:.3g}\u202fh"
