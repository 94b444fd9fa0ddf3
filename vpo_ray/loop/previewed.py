"""What a run's previews amount to: their entry in the ledger."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vpo_ray.recipe import Recipe
from vpo_ray.stages.preview import MEASURED, preview_run
from vpo_ray.stages.tally import by_reason, reason_of
from vpo_ray.storage.run_dir import RunDir

_COLUMNS = ("candidate_id", "video_key", "skipped", "score", "seconds", "error")


def previews_entry(run: RunDir, recipe: Recipe) -> dict[str, Any]:
    """Rows here are prompts to preview: one with a score is out.

    Returns:
        The ledger's keys of a stage, and distinct `videos`, `score_seconds` (`seconds` are of rendering), and
        `probe`: what the run measured of its previews, without the ids of its queries (see
        `preview.probe_figures`), or None before it has.
    """
    previews = preview_run(recipe, run)
    skipped, errored = Counter[str](), Counter[str]()
    videos: set[str] = set()
    seconds, timed = {"render": 0.0, "score": 0.0}, 0
    out = 0
    for row in previews.table("feedback").rows(_COLUMNS):
        spent = row["seconds"] or {}
        timed += spent.get("render") is not None
        seconds = {stage: total + (spent.get(stage) or 0.0) for stage, total in seconds.items()}
        videos.update([row["video_key"]] if row["video_key"] is not None else [])
        if row["error"] is not None:
            errored[reason_of(row["error"])] += 1
        elif row["skipped"] is not None:
            skipped[row["skipped"]] += 1
        else:
            out += 1
    measured = run.read_json(MEASURED) if run.exists(MEASURED) else None
    if measured is not None:
        measured = {**measured, "probe": len(measured["probe"])}
    return {
        "in": previews.table("verdicts").count(),
        "out": out,
        "dropped": {},
        "skipped": by_reason(skipped),
        "errored": by_reason(errored),
        "seconds": round(seconds["render"], 3) if timed else None,
        "seconds_per_row": round(seconds["render"] / timed, 4) if timed else None,
        "score_seconds": round(seconds["score"], 3) if timed else None,
        "videos": len(videos),
        "probe": measured,
    }
