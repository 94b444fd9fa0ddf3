"""`vpo refine QUERY --recipe RECIPE`: the best prompt of one query that a budget of videos finds."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpo_ray.loop.refine import Refined
    from vpo_ray.recipe import Recipe

HELP = "evolve the prompts of one query now, and print the best with its trace"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo refine` its arguments."""
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("--recipe", required=True, help="recipe file (YAML), whose models are used")
    parser.add_argument(
        "--budget",
        type=_budget,
        default=8,
        metavar="N",
        help="videos at most, the query's own among them (%(default)s)",
    )
    parser.add_argument("--image", metavar="FILE", help="path or URI of the query's image")
    parser.add_argument("--out", metavar="DIR", help="run directory or URI, instead of the recipe's `out`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--retry-errors", action="store_true", help="take prompts that failed once more")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Print what was found. Raises what `loop.refine.refine` does."""
    from vpo_ray import api

    found = api.refine(
        recipe,
        arguments.query,
        image=arguments.image,
        budget=arguments.budget,
        retry_errors=arguments.retry_errors,
        verbose=arguments.verbose,
    )
    shown = json.dumps(_as_json(found), ensure_ascii=False, indent=2) if arguments.json else _as_text(found)
    sys.stdout.write(shown + "\n")
    return 0


def _budget(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is not 2 or more: the query's own video is one of them")
    return number


def _as_json(found: Refined) -> dict[str, Any]:
    columns = ("prompt_id", "parent_ids", "round", "prompt", "verdict", "skipped", "fitness", "dimensions",
               "video_uri", "target", "error")  # fmt: skip
    return {
        "query": found.query,
        "image": found.trace[0]["image"],
        "prompt": found.prompt,
        "fault": found.fault,
        "ended": found.ended,
        "videos": found.videos,
        "folder": found.folder,
        "trace": [{name: row[name] for name in columns} for row in found.trace],
    }


def _as_text(found: Refined) -> str:
    """The prompt on the first line, and what was tried. Texts are shown without control characters."""
    lines = [_printable(found.prompt), ""]
    lines += [f"{'round':>5} {'fitness':>9}  prompt"]
    for row in found.trace:
        fitness = "" if row["fitness"] is None else f"{row['fitness']:.4f}"
        misaligned = row["verdict"] if row["verdict"] != "aligned" else None
        why = row["error"] or row["skipped"] or misaligned
        mark = "*" if row["target"] else " "
        text = _printable(row["prompt"] or "")
        lines.append(
            f"{row['round']:>5} {fitness:>9} {mark}{text}" + (f" ({_printable(why)})" if why else "")
        )
    ended = f"{found.videos} videos; ended: {found.ended}"
    return "\n".join([*lines, "", f"{ended}; {found.fault}" if found.fault else ended])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
