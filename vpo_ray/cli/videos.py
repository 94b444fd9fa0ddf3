"""`vpo videos`: look at a store of rendered videos, check its bytes, and delete what nobody needs.

vpo videos ls STORE                                  keys, sizes, prompts
vpo videos verify STORE                              read every video; --delete removes damaged ones
vpo videos prune STORE --keep runs/a --older-than 30d    what would go; --delete lets it go

STORE is a folder or a URI, or a recipe whose store is meant. Only `--delete` deletes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpo_ray.storage.videos import Entry, VideoStore

HELP = "list, check or tidy a store of rendered videos"
EXCERPT = 60
# A write takes seconds; what is younger than this may be one that is still going on.
DEFAULT_AGE = timedelta(days=1)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class VideosError(ValueError):
    """A store, a run or an age that cannot be meant; the message says what to give."""


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo videos` its subcommands."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, text in (
        ("ls", _ls, "list videos with size, shape and prompt"),
        ("verify", _verify, "read every video and list the damaged ones; status 1 if there are any"),
        ("prune", _prune, "say what may be deleted, and delete it with --delete"),
    ):
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        sub.add_argument("store", help="folder or URI of the store, or a recipe (*.yaml) that uses it")
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")
        if name != "ls":
            sub.add_argument("--delete", action="store_true", help="delete what is listed")
        if name == "prune":
            sub.add_argument(
                "--older-than",
                type=age,
                metavar="AGE",
                help="whole videos too that were written longer ago, e.g. 12h, 30d, 8w",
            )
            sub.add_argument(
                "--keep",
                action="append",
                default=[],
                metavar="RUN_DIR",
                help="whole videos too, but none that this run's tables name; may be repeated",
            )


def _ls(arguments: argparse.Namespace) -> int:
    store = _store(arguments.store)
    entries = list(store.entries())
    listed = [{**_fields(entry), **_facts(info)} for entry, info in store.infos(entries)]
    if arguments.json:
        _print_json({"store": store.folder.uri, "videos": listed, **_totals(entries)})
        return 0
    for video in listed:
        shape = "incomplete" if video["frames"] is None else "{frames} x {width} x {height}".format(**video)
        prompt = excerpt(video["prompt"] or "")
        _print(f"{video['key']}  {size(video['size']):>9}  {shape:<17}  {prompt}")
    _print(_total_line(entries, store))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = _store(arguments.store)
    read, bad = 0, []
    for entry, problem in store.inspect():
        read += 1
        if problem is not None:
            bad.append((entry, problem))
    # A video that lacks a file may be one that is being written.
    young = datetime.now(UTC) - DEFAULT_AGE
    doomed = [entry for entry, _ in bad if entry.complete or entry.written < young]
    if arguments.delete:
        for entry in doomed:
            store.delete(entry.key)
    if arguments.json:
        problems = [{**_fields(entry), "problem": problem} for entry, problem in bad]
        gone = [entry.key for entry in doomed] if arguments.delete else []
        _print_json({"store": store.folder.uri, "read": read, "damaged": problems, "deleted": gone})
    else:
        for entry, problem in bad:
            _print(f"{entry.key}  {_line(problem)}")
        done = f", {len(doomed)} deleted" if arguments.delete else ""
        _print(f"{read} videos read, {len(bad)} damaged or incomplete{done}")
    return 1 if bad else 0


def _prune(arguments: argparse.Namespace) -> int:
    store = _store(arguments.store)
    keep = _named_by(arguments.keep)
    whole = bool(arguments.keep) or arguments.older_than is not None
    before = datetime.now(UTC) - (DEFAULT_AGE if arguments.older_than is None else arguments.older_than)
    gone = store.prune(before, keep, complete=whole, dry_run=not arguments.delete)
    if arguments.json:
        _print_json(
            {
                "store": store.folder.uri,
                "deleted": arguments.delete,
                "before": before.isoformat(timespec="seconds"),
                "kept_by_runs": len(keep),
                "videos": [_fields(entry) for entry in gone],
                **_totals(gone),
            }
        )
        return 0
    for entry in gone:
        kind = "video" if entry.complete else "leftover of an interrupted write"
        _print(f"{entry.key}  {size(entry.size):>9}  {entry.written:%Y-%m-%d %H:%M}  {kind}")
    _print(_total_line(gone, store) + (" deleted" if arguments.delete else " would be deleted"))
    if gone and not arguments.delete:
        _print("Nothing was deleted; give --delete to do it")
    return 0


def _store(name: str) -> VideoStore:
    """Raises VideosError: no such folder, or a folder that is a run directory and not its store."""
    from vpo_ray.files.folder import Folder
    from vpo_ray.storage.videos import VideoStore

    if name.endswith((".yaml", ".yml")):
        from vpo_ray import recipe as recipes

        recipe = recipes.load(name)
        name = recipe.render.store or Folder(recipe.out).at("videos")
    store = VideoStore(name)
    if store.folder.is_local and not Path(store.folder.path).is_dir():
        raise VideosError(f"there is no video store at {store.folder.uri}: no such folder")
    if store.folder.exists("recipe.yaml"):
        own = store.folder.at("videos")
        raise VideosError(f"{store.folder.uri} is a run directory; its own store is {own}")
    return store


def _named_by(runs: Iterable[str]) -> set[str]:
    """Keys of all videos that tables of these runs name, those of their rounds and evaluations among them.

    Raises:
        VideosError: a folder that is no run directory: its videos would be taken for unused.
    """
    from vpo_ray.storage.run_dir import TABLES, RunDir

    keep: set[str] = set()
    for name in runs:
        run = RunDir(name)
        if not run.exists("recipe.yaml"):
            raise VideosError(f"--keep {run.uri}: no run directory, it has no recipe.yaml")
        tables = [name for name, (schema, _) in TABLES.items() if "video_key" in schema.names]
        for table in (part.table(name) for _, part in run.with_inner() for name in tables):
            keep.update(row["video_key"] for row in table.rows(["video_key"]))
    keep.discard(None)
    return keep


def age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([mhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: write 90m, 12h, 30d or 8w")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def _fields(entry: Entry) -> dict[str, Any]:
    return {**entry._asdict(), "written": entry.written.isoformat(timespec="seconds")}


def _facts(info: dict[str, Any] | None) -> dict[str, Any]:
    names = ("prompt", "seed", "frames", "fps", "width", "height", "generator", "seconds")
    return {name: (info or {}).get(name) for name in names}


def _totals(entries: list[Entry]) -> dict[str, Any]:
    return {"count": len(entries), "bytes": sum(entry.size for entry in entries)}


def _total_line(entries: list[Entry], store: VideoStore) -> str:
    incomplete = sum(not entry.complete for entry in entries)
    more = f", {incomplete} of them incomplete" if incomplete else ""
    return f"{len(entries)} videos, {size(sum(entry.size for entry in entries))} in {store.folder.uri}{more}"


def size(count: float) -> str:
    """Bytes with a decimal unit: 1,234,567 is 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def excerpt(text: str, width: int = EXCERPT) -> str:
    """The beginning of a user's text on one line, without what a terminal would obey."""
    line = _line(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _print(line: str) -> None:
    sys.stdout.write(_line(line) + "\n")


def _print_json(value: dict[str, Any]) -> None:
    # ASCII, so that a terminal gets no control character of a prompt either.
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
