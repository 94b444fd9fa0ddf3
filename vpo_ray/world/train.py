"""Trains the world's models from nothing: `python -m vpo_ray.world.train PART [--out FOLDER]`.

Those in the repository were made by its parts in several runs, but for `other_video`, which is what one run
of it made (`weights/figures.json`). Each part is a module `train_PART` with a function
`train(folder, minutes)`, which writes the weights and returns what was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
from importlib import import_module
from pathlib import Path

PARTS = ("video", "other_video", "judge", "reward")
WEIGHTS = Path(__file__).parent / "weights"


def train_part(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the small world's models from nothing.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, help="folder for the weights; the package's own when unset")
    parser.add_argument("--minutes", type=float, help="no more than so long, whatever the number of steps")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = given.out or WEIGHTS / given.part
    figures = import_module(f"vpo_ray.world.train_{given.part}").train(folder, given.minutes)
    note_figures(folder.parent / "figures.json", given.part, figures)


def note_figures(path: Path, part: str, figures: dict[str, object]) -> None:
    """Set a part's entry of a file of figures."""
    noted = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(noted | {part: figures}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    train_part()
