"""What a recipe names that is published: where, how large, under which licence (`data/published.yaml`)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vpo_ray.recipe import Recipe
from vpo_ray.recipe.base import sources
from vpo_ray.recipe.plugins import plugin_sources

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# Keys that name a model, by their last part; options of a plugin may, too.
_OF_MODELS = ("model", "clip", "dino")
_IS_FILE = re.compile(r".*\.(txt|json|jsonl|ya?ml|csv|tsv|parquet)")
_DATA = Path(__file__).parents[1] / "data" / "published.yaml"


@dataclass(frozen=True)
class Published:
    """Something to download.

    Attributes:
        keys: of the recipe that name it.
        named: as the recipe names it: a hub id, a URL, or a path of this machine.
        model: its hub id; None for a file.
        url: of a file; None for a model, and for a file that is made of others.
        made_of: names of the published files that it is made of.
        sha256: of a file, where it is known.
        gigabytes: about; None where not known.
    """

    keys: tuple[str, ...]
    named: str
    model: str | None = None
    revision: str | None = None
    url: str | None = None
    made_of: tuple[str, ...] = ()
    sha256: str | None = None
    license: str = "not known here"
    gated: bool = False
    gigabytes: float | None = None

    @property
    def is_path(self) -> bool:
        """Whether the recipe looks for it at a path of this machine."""
        return self.named not in (self.model, self.url) and "://" not in self.named


def published_models() -> dict[str, dict[str, Any]]:
    """What is known of models on the hub: `license`, `gated`, `gigabytes`."""
    found: dict[str, dict[str, Any]] = _catalogue()["models"]
    return found


def published_files() -> dict[str, dict[str, Any]]:
    """Where published files and folders are, by their names."""
    found: dict[str, dict[str, Any]] = _catalogue()["files"]
    return found


def downloads(recipe: Recipe) -> tuple[list[Published], dict[str, str]]:
    """What a recipe names and a download can bring, and what only the user can: paths by key that are not
    here."""
    found: dict[tuple[str, str | None], Published] = {}
    own: dict[str, str] = {}
    asked = _of_endpoints(recipe)
    for key, name in (*sources(recipe), *plugin_sources(recipe).items()):
        if key in asked or name.startswith("builtin:") or _is_here(name):
            continue
        made = published(name, revision_of(recipe, key), _may_be_model(key, name))
        if made is None:
            if "://" not in name:
                own[key] = name
            continue
        before = found.get((name, made.revision))
        keys = (*(before.keys if before else ()), key)
        found[name, made.revision] = Published(**{**vars(made), "keys": keys})
    return list(found.values()), own


def published(name: str, revision: str | None = None, may_be_model: bool = True) -> Published | None:
    """What is known of a hub id, a URL or a path; None for a path whose last part is not known."""
    if name.startswith(("https://", "http://")):
        url, _, fragment = name.partition("#")
        given = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        return Published((), name, url=url, sha256=given)
    if "://" in name:
        return None
    if may_be_model and HUB_ID.fullmatch(name):
        return Published((), name, name, revision, **published_models().get(name, {}))
    entry = dict(published_files().get(os.path.basename(name.rstrip("/")), {}))
    if not entry:
        return None
    if model := entry.get("model"):
        return Published((), name, model, **published_models().get(model, {}))
    entry["made_of"] = tuple(entry.get("made_of", ()))
    return Published((), name, **entry)


def weights_of_all(questions: str, selected: str, weights: list[float]) -> list[float]:
    """VisionReward's weights, a number for each question: 0 for those that are not selected.

    Args:
        questions, selected: texts of a question a line.
        weights: of the selected ones.
    """
    known = dict(zip(selected.splitlines(), weights, strict=True))
    return [known.get(question, 0) for question in questions.splitlines()]


def _may_be_model(key: str, name: str) -> bool:
    leaf = key.rpartition(".")[2]
    return (
        leaf in _OF_MODELS
        or key.endswith("lora.path")
        or (".options." in key and not _IS_FILE.fullmatch(name))
    )


def revision_of(recipe: Recipe, key: str) -> str | None:
    """The revision that the section of a key names."""
    node: Any = recipe
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
    return getattr(node, "revision", None)


def _of_endpoints(recipe: Recipe) -> set[str]:
    """Keys of models that are an endpoint's, and so no hub ids."""
    found = set()
    for key, _ in sources(recipe):
        node: Any = recipe
        for part in key.split(".")[:-1]:
            node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
        if key.endswith("model") and getattr(node, "named", "") == "openai":
            found.add(key)
    return found


def _is_here(name: str) -> bool:
    return "://" not in name and Path(name).exists()


@cache
def _catalogue() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_DATA.read_text("utf-8"))
    return found
