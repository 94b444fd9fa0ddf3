"""What a recipe names that is not on this machine, told apart from what is wrong with it.

A plan is made on a laptop too, where neither the models nor the data are.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from vpo_ray.files.input_files import matches, path_of_uri
from vpo_ray.recipe import Recipe, sources
from vpo_ray.recipe.plugins import plugin_sources


def absent_sources(recipe: Recipe) -> dict[str, str]:
    """Paths of this machine that the recipe names and that are not there, by key. Hub ids are among them."""
    named = (*sources(recipe), *plugin_sources(recipe).items())
    return {key: name for key, name in named if _is_absent(name)}


def only_absent(recipe: Recipe, problems: Sequence[str]) -> tuple[list[str], list[str]]:
    """Problems that end when a file or folder is put where the recipe says, and the others."""
    absent = absent_sources(recipe)
    paths = [re.compile(rf"(?<!\S){re.escape(name)}(?![^\s:,;)])") for name in absent.values()]
    found: tuple[list[str], list[str]] = [], []
    for line in problems:
        ends = line.partition(": ")[0] in absent or any(path.search(line) for path in paths)
        found[0 if ends else 1].append(line)
    return found


def _is_absent(name: str) -> bool:
    if name.startswith("builtin:") or ("://" in name and not name.startswith("file://")):
        return False
    path = path_of_uri(name) if name.startswith("file://") else name
    return not Path(path).exists() and not (glob.has_magic(path) and matches(path))
