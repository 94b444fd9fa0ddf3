"""`vpo collect` and `vpo forget`: what users of an endpoint said, as data, and taken out again.

vpo collect s3://bucket/feedback --to data/live     queries.jsonl, images, pairs, figures.json
vpo forget s3://bucket/feedback --key studio        every row of a key
vpo forget s3://bucket/feedback --older-than 90d    every older row
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from vpo_ray.cli.videos import age

_COUNTS = ("answers", "opinions", "queries", "images", "pairs")

COLLECT = "make queries, preference pairs and figures of what users of an endpoint said"
FORGET = "take answers and feedback out of an endpoint's store"


def add_collect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_collect)
    parser.add_argument("store", help="folder or URI, as `serve.feedback.store`")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder or URI to write to")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")


def add_forget(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_forget)
    parser.add_argument("store", help="folder or URI, as `serve.feedback.store`")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", metavar="NAME", help="rows of this API key")
    which.add_argument("--answer", metavar="ID", help="an answer, by its id, and what was said of it")
    which.add_argument("--older-than", type=age, metavar="AGE", help="rows that are older, e.g. 90d")
    parser.add_argument(
        "--collected",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of `vpo collect` to make again",
    )


def _collect(arguments: argparse.Namespace) -> int:
    from vpo_ray.evaluation.live import collect

    figures = collect(_store(arguments.store), arguments.to)
    if arguments.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    sys.stdout.writelines(_lines(figures, arguments.to))
    return 0


def _lines(figures: dict[str, Any], folder: str) -> list[str]:
    counts = ", ".join(f"{figures[name]} {name}" for name in _COUNTS)
    lines = [f"{folder}: {counts}\n"]
    lines += [f"left out: {count} {reason}\n" for reason, count in figures["left_out"].items()]
    for name, entry in figures["checkpoints"].items():
        shares = ", ".join(
            f"{what} {entry[what]['value']:.0%}"
            for what in ("liked", "disliked", "edited")
            if entry["spoken_of"]
        )
        lines.append(
            f"{name}: {entry['answers']} answers, {entry['spoken_of']} spoken of; {shares or 'no share'}\n"
        )
    return lines


def _forget(arguments: argparse.Namespace) -> int:
    from vpo_ray.evaluation.live import collect, is_collected
    from vpo_ray.files.folder import StorageError
    from vpo_ray.storage.feedback_tables import FeedbackTables

    store = _store(arguments.store)
    for folder in arguments.collected:
        if not is_collected(folder):
            raise StorageError(f"--collected {folder}: nothing was collected there; nothing is forgotten yet")
    before = time.time() - arguments.older_than.total_seconds() if arguments.older_than else None
    answer = arguments.answer.partition(".")[0] if arguments.answer else None
    tables = FeedbackTables(store)
    rows, images = tables.forget(arguments.key, answer, before)
    tables.merge()
    for folder in arguments.collected:
        collect(store, folder)
    sys.stdout.write(f"{arguments.store}: {rows} rows and {images} images are gone\n")
    return 0


def _store(name: str) -> str:
    """The store as it was given. Raises StorageError where it is a folder of this machine, and not there."""
    from vpo_ray.files.folder import Folder, StorageError

    folder = Folder(name)
    if folder.is_local and not Path(folder.path).is_dir():
        raise StorageError(f"there is no feedback at {folder.uri}: no such folder")
    return name
