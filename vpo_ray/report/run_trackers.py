"""MLflow and W&B get a whole run, too: its funnel, its evaluation, and the pages of both.

The curves of training are `train.track`'s. A run directory has one run there, with the recipe's name, which
every report and evaluation brings up to date. As with a curve, a tracker that fails costs a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from vpo_ray.evaluation.evaluate import Evaluated
from vpo_ray.files.folder import Folder
from vpo_ray.loop.ledger import funnel
from vpo_ray.recipe import Recipe, Track
from vpo_ray.records import content_id
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train.track import MLflow, WandB

logger = logging.getLogger(__name__)

_COUNTS = ("in", "out", "dropped", "skipped", "errored")


def track_run(run: RunDir, recipe: Recipe, evaluated: Evaluated | None = None) -> None:
    """Bring the run's entry up to date at the trackers that the recipe's training has: numbers and pages.

    Args:
        evaluated: the evaluation that was just made; its figures become metrics.
    """
    track = _track(recipe)
    if track is None:
        return
    makers: dict[str, Callable[..., Any]] = {"MLflow": MLflow, "Weights & Biases": WandB}
    wanted = {"MLflow": track.mlflow, "Weights & Biases": track.wandb}
    for title in (title for title in makers if wanted[title]):
        try:
            settings = {"out": run.uri, "fingerprint": recipe.fingerprint()}
            tracker = makers[title](track.project, content_id("run", run.uri), recipe.name, settings)
            tracker.put(*_known(run, evaluated))
            tracker.close(failed=False)
        except Exception as error:  # noqa: BLE001  any client may fail in any way
            logger.warning("%s gets nothing of the run: %s: %s", title, type(error).__name__, error)


def _track(recipe: Recipe) -> Track | None:
    phases = [recipe.rl, recipe.dpo, recipe.sft]
    found = [phase.track for phase in phases if phase is not None]
    return next((track for track in found if track.mlflow or track.wandb), None)


def _known(run: RunDir, evaluated: Evaluated | None) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers by name, and files by name."""
    numbers: dict[str, float] = {}
    ledger = run.read_json("ledger.json") if run.exists("ledger.json") else {}
    if ledger:
        numbers |= {f"funnel/{name}": float(count) for name, count in funnel(ledger).items()}
    for stage, entry in ledger.get("stages", {}).items():
        for count in _COUNTS:
            value = entry.get(count)
            value = sum(value.values()) if isinstance(value, Mapping) else value
            if isinstance(value, int | float):
                numbers[f"{stage}/{count}"] = float(value)
    places = [(Folder(run.uri), "ledger.json"), (Folder(run.uri), "report/index.html")]
    if evaluated is not None:
        numbers |= dict(_figures(evaluated.results["results"]))
        places += [(Folder(evaluated.folder.uri), name) for name in ("results.json", "report.html")]
    files = {name: place.read(name).decode("utf-8") for place, name in places if place.exists(name)}
    return numbers, files


def _figures(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Of every set, video model, policy and measure the value, by names that trackers take."""
    found = []
    for of_set, models in results.items():
        for model, policies in models.items():
            for policy, measures in policies.items():
                for measure, figure in measures.items():
                    if isinstance(value := figure.get("value"), int | float):
                        found.append((f"evaluation/{of_set}/{model}/{policy}/{measure}", float(value)))
    return found
