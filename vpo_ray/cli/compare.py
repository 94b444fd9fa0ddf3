"""`vpo compare`: what people prefer of what two policies made.

vpo compare page EVALUATION --policies query,dpo --what video --to DIR    a page of blind pairs
vpo compare votes votes-*.json --samples EVALUATION                       read the votes back

EVALUATION is the folder of an evaluation, <run>/evaluation/<id>, or its URI.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.records import Row

HELP = "ask people which of two policies' prompts or videos is better, on a page of blind pairs"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo compare` its subcommands."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    text = "write a page of blind pairs, a folder to send to people or to put on a web server"
    page = actions.add_parser("page", help=text, description=text, allow_abbrev=False)
    page.set_defaults(command=_page)
    page.add_argument("samples", metavar="EVALUATION", help="folder or URI: <run>/evaluation/<id>")
    page.add_argument("--policies", required=True, metavar="A,B", help="names of the policies to compare")
    page.add_argument("--what", required=True, choices=("prompt", "video"))
    page.add_argument("--to", required=True, metavar="DIR", help="folder or URI to write to")
    page.add_argument("--set", metavar="SET", help="queries of this set only")
    page.add_argument("--limit", type=int, metavar="N", help="at most so many pairs, chosen by their content")

    text = "read votes from the page: agreement of the raters, wins and losses"
    votes = actions.add_parser("votes", help=text, description=text, allow_abbrev=False)
    votes.set_defaults(command=_votes)
    votes.add_argument("votes", nargs="+", metavar="VOTES", help="files that the page's raters downloaded")
    votes.add_argument(
        "--samples",
        required=True,
        metavar="EVALUATION",
        help="that the page was made of; votes are kept there",
    )


def _page(arguments: argparse.Namespace) -> int:
    from vpo_ray.files.folder import Folder
    from vpo_ray.report.compare_page import write_compare_page

    written = write_compare_page(
        Folder(arguments.samples),
        Folder(arguments.to),
        arguments.what,
        [name.strip() for name in arguments.policies.split(",")],
        arguments.set,
        arguments.limit,
    )
    _print(f"compare: {written.pairs} pairs, see {written.uri}")
    _print_left_out(written.left_out, "pairs")
    return 0


def _votes(arguments: argparse.Namespace) -> int:
    from vpo_ray.evaluation import people
    from vpo_ray.files.folder import Folder

    evaluation = Folder(arguments.samples)
    read = people.read_votes(
        {name: _read(name) for name in arguments.votes}, people.samples_to_compare(evaluation)
    )
    table = people.votes_table(evaluation)
    known = {row["comparison_id"]: row for row in table.rows()}
    changed = sum(known.get(row["comparison_id"], row)["answer"] != row["answer"] for row in read.rows)
    known |= {row["comparison_id"]: row for row in read.rows}
    table.replace(known[key] for key in sorted(known))
    for line in _summary(known.values()):
        _print(line)
    _print_left_out(read.left_out, "votes")
    if changed:
        _print(f"{changed} earlier votes were changed")
    _print(f"compare: {len(known)} votes are in {table.uri}; evaluate again to have them in its results")
    return 0


def _summary(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each two policies: what they were compared by, wins, losses, and raters' agreement."""
    from vpo_ray.evaluation.statistics import agreement

    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["what"], row["video_model"], *sorted((row["a"], row["b"]))].append(row)
    for (of, what, video_model, one, other), votes in sorted(groups.items()):
        items: Mapping[tuple[str, int], list[str]] = defaultdict(list)
        for row in votes:
            winner = row[row["answer"]] if row["answer"] in ("a", "b") else "tie"
            items[row["query_id"], row["seed"]].append(winner)
        all_votes = Counter(winner for item in items.values() for winner in item)
        raters = len({row["by"] for row in votes})
        model = f", {video_model}" if what == "video" else ""
        yield (
            f"{of}, {what}s{model}: {one} better {all_votes[one]}, {other} better {all_votes[other]}, "
            f"tie {all_votes['tie']} ({len(items)} pairs, {raters} rater{'s' * (raters > 1)})"
        )
        found = agreement(items.values())
        if not found.n:
            yield "  agreement of raters: no pair has votes of two"
            continue
        alpha = "none, all votes are equal" if found.alpha is None else f"{found.alpha:.2f}"
        yield (
            f"  agreement of raters on {found.n} pairs: {found.share:.0%} of two votes are equal, "
            f"Krippendorff's alpha {alpha}"
        )


def _read(name: str) -> bytes:
    from vpo_ray.evaluation.people import VotesError

    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise VotesError(f"cannot read {name}: {error.strerror}") from error


def _print_left_out(counts: Counter[str], what: str) -> None:
    for reason, count in sorted(counts.items()):
        _print(f"left out: {count} {what}, {reason}")


def _print(line: str) -> None:
    sys.stdout.write("".join(c if c.isprintable() else " " for c in line) + "\n")
