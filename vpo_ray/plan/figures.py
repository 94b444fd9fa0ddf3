"""Where a plan's figures come from: a ledger of a past run, a published time, or nowhere.

A figure that nobody measured stays unknown, with what to do about it; none is made up.
"""

from __future__ import annotations

import glob
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.input_files import InputError, path_of_uri
from vpo_ray.plan.check import PlanError
from vpo_ray.recipe import Recipe, Render, differences, parse_stored, video_presets
from vpo_ray.stages import spec
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.storage.videos import VideoStore

# Recipe sections whose settings decide how long a row of a training phase takes.
PHASE_SETTINGS = {"sft": ("policy", "sft"), "dpo": ("policy", "dpo"), "rl": ("policy", "rl")}
PUBLISHED_STEPS = 50  # of the times in data/video_presets.yaml
ENOUGH = 50  # videos whose sizes make a mean


@dataclass(frozen=True)
class Figure:
    """A number and its source, or None and how to get one.

    sure: `measured` by a run with these settings, or `other settings`; `published` for this model at these
    settings, or `scaled` from others; empty where it is not known.
    """

    value: float | None
    source: str
    sure: Literal["measured", "other settings", "published", "scaled", ""] = ""


@dataclass(frozen=True)
class Ledger:
    """What a past run measured. `changed` names the settings of the recipe that were others then;
    `workers` are those of its training phases, where known."""

    uri: str
    stages: dict[str, Any]
    changed: tuple[str, ...] = ()
    workers: dict[str, int] = field(default_factory=dict)

    def seconds(self, stage: str) -> Figure | None:
        """Replica-seconds a row of a stage or training phase, or None if it did not run."""
        value = self.stages.get(stage, {}).get("seconds_per_row")
        if value and stage in PHASE_SETTINGS:
            # Training is measured by the clock, with all workers at it.
            if stage not in self.workers:
                return None
            value *= self.workers[stage]
        if not value:
            return None
        settings = PHASE_SETTINGS[stage] if stage in PHASE_SETTINGS else spec.stage(stage).settings
        other = [line for line in self.changed if line.split(".")[0] in settings]
        note = f", with other settings then: {'; '.join(other)}" if other else ""
        return Figure(value, f"measured, {self.uri}{note}", "other settings" if other else "measured")

    def preview_seconds(self) -> Figure | None:
        """Replica-seconds of rendering a preview, where a run with these settings made some."""
        value = self.stages.get("preview", {}).get("seconds_per_row")
        if not value or any(line.startswith("render.") for line in self.changed):
            return None
        return Figure(value, f"measured, {self.uri}", "measured")

    def share(self, part: str, stage: str, kind: str) -> float | None:
        """Which share of the rows that left a stage counts as `part`, e.g. verdicts: aligned."""
        entry = self.stages.get(stage, {})
        return entry[kind].get(part, 0) / entry["out"] if entry.get("out") and kind in entry else None

    def videos_a_query(self, strategy: str) -> float | None:
        """What `render.strategy` renders (or would have rendered) of a query, on average."""
        pair = self.stages.get("pair", {})
        found = pair.get("videos", {}).get(strategy)
        return found["videos"] / pair["in"] if found and pair.get("in") else None


def read_ledger(recipe: Recipe, given: str | None) -> Ledger | None:
    """The ledger of a file or run directory, or that of the recipe's own run if there is one.

    Raises:
        PlanError: the given one is not there or is no ledger.
    """
    place, sign, options = (given or recipe.out), "", ""
    if "://" in place:
        place, sign, options = place.partition("?")
    name = "ledger.json"
    if given is not None and place.endswith(".json"):
        place, _, name = place.rpartition("/")
    try:
        run = RunDir(f"{place or '.'}{sign}{options}")
        if given is None and not run.exists(name):
            return None
        stages = json.loads(run.read(name))["stages"]
        then = _recipe_of(run)
    except (OSError, StorageError, ValueError, KeyError, TypeError) as error:
        where = f"out {recipe.out}" if given is None else f"--ledger {given}"
        raise PlanError(f"{where}: no ledger.json of a run there ({error})") from error
    if then is None:
        return Ledger(run.at(name), stages)
    workers = {
        name: phase.workers for name in ("sft", "dpo", "rl") if (phase := getattr(then, name)) is not None
    }
    return Ledger(run.at(name), stages, tuple(differences(then.dump(), recipe.dump())), workers)


def _recipe_of(run: RunDir) -> Recipe | None:
    if not run.exists("recipe.yaml"):
        return None
    return parse_stored(yaml.safe_load(run.read("recipe.yaml")), run.at("recipe.yaml"))


def published_seconds(settings: Render, gpu_type: str | None) -> Figure:
    """The time that a model's authors published for one of its videos on one GPU of this type.

    It holds for the preset's frames and size; steps are taken in proportion. What makes a pipeline
    faster is not in it.
    """
    if settings.kind != "diffusers":
        return Figure(None, "no time of a service is published")
    name = next((name for name, preset in video_presets().items() if _same(settings, preset)), None)
    preset = video_presets().get(name or "", {})
    if "seconds" not in preset:
        return Figure(None, "no published time for this model at these frames and size")
    seconds, source = preset["seconds"], preset["sources"][0].split()[0]
    if gpu_type is None:
        return Figure(None, f"published for {' and '.join(seconds)}: name your GPUs with --gpu-type")
    kind = gpu_type.split("-")[0]
    if kind not in seconds:
        return Figure(None, f"published for {' and '.join(seconds)}, not for {gpu_type}")
    value = seconds[kind] * settings.steps / PUBLISHED_STEPS
    faster = [key for key in ("compile", "quantize", "cache") if getattr(settings, key)]
    note = f"; without {' and '.join(faster)}" if faster else ""
    scaled = f", taken to {settings.steps}" if settings.steps != PUBLISHED_STEPS else ""
    sure: Literal["scaled", "published"] = "scaled" if scaled or faster else "published"
    return Figure(value, f"published for {kind} at {PUBLISHED_STEPS} steps{scaled}{note}: {source}", sure)


def _same(settings: Render, preset: dict[str, Any]) -> bool:
    keys = ("model", "frames", "height", "width")
    return all(str(getattr(settings, key)).lower() == str(preset["settings"][key]).lower() for key in keys)


def count_rows(path: str) -> int | None:
    """Rows of SFT data on this machine; None for those elsewhere, or nowhere yet."""
    if "://" in path and not path.startswith("file://"):
        return None
    if not glob.has_magic(path) and not Path(path_of_uri(path)).exists():
        return None
    try:
        return sum(1 for _ in sft_rows(path))
    except InputError as error:
        raise PlanError(str(error)) from error


def bytes_per_video(recipe: Recipe) -> Figure:
    """The mean size of videos of the recipe's shape in its store, or None if there are none yet."""
    settings = recipe.render
    uri = settings.store or Folder(recipe.out).at("videos")
    raw = settings.frames * settings.width * settings.height * 1.5  # yuv420p: 12 bits a pixel
    unknown = f"not known before some are rendered; unencoded, {raw / 1e6:.1f} MB each"
    alike: dict[str, Any] = {
        "frames": settings.frames,
        "width": settings.width + settings.width % 2,
        "height": settings.height + settings.height % 2,
    }
    if settings.kind == "openai":
        unknown = "not known before some are rendered"
        alike = {"generator": settings.model, "settings": {"request": settings.endpoint.request}}
    try:
        store = VideoStore(uri)
        infos = (info for _, info in store.infos(store.entries()) if info is not None)
        found = (info["length"] for info in infos if alike == {name: info.get(name) for name in alike})
        sizes = list(itertools.islice(found, ENOUGH))
    except StorageError as error:
        return Figure(None, f"{unknown} (the store cannot be read: {error})")
    if not sizes:
        return Figure(None, unknown)
    return Figure(
        sum(sizes) / len(sizes), f"mean of {len(sizes)} of this shape in {store.folder.uri}", "measured"
    )
