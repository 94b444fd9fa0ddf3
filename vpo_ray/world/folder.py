"""Folders of the world: each is made whole or not at all, and kept where it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpo_ray.files.folder import share

MARKER = "world.json"


class WorldError(ValueError):
    """A folder of the world that cannot be made; the message says why and what to do."""


def make_once(folder: str | Path, marker: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Make a folder, unless it is there with this marker. Another marker's is replaced.

    Args:
        marker: what the content is made of, as JSON has it.
        build: writes the content into an empty folder, which gets its name when that is done.

    Raises:
        WorldError: the folder holds files and no marker, so that it is somebody else's.
    """
    folder = Path(folder)
    path = folder / MARKER
    if path.exists() and json.loads(path.read_text("utf-8")) == marker:
        return
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise WorldError(f"{folder} holds files that are not the world's: name another folder")
    begun = folder.with_name(f"{folder.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    build(begun)
    (begun / MARKER).write_text(json.dumps(marker) + "\n", "utf-8")
    share(begun)
    shutil.rmtree(folder, ignore_errors=True)
    begun.rename(folder)
