"""The page of blind pairs: `vpo compare page`. People look at two prompts or two videos of one query and say
which is better; nothing on the page says which policy made one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vpo_ray.evaluation import people
from vpo_ray.evaluation.people import BlindPair, VotesError, What
from vpo_ray.files.folder import Folder
from vpo_ray.records import Row, content_id
from vpo_ray.report.page import copy_video, render_page, video_stores

PAGE = "index.html"


class ComparePage(NamedTuple):
    """Where the page is, its number of pairs, and how many have nothing to compare, by reason."""

    uri: str
    pairs: int
    left_out: Counter[str]


def write_compare_page(
    evaluation: Folder,
    to: Folder,
    what: What,
    policies: Sequence[str],
    only_set: str | None = None,
    limit: int | None = None,
) -> ComparePage:
    """Write `index.html`, and its videos under `videos/`, so that the folder can be sent to people.

    The pairs are in the order of their ids, which are hashes of content: with a limit, and when people stop
    half-way, those that have votes are a fair sample.

    Args:
        policies: at least two; all pairs of them are shown.
        only_set: queries of this set only.

    Raises:
        VotesError: no such policy or set, or no pair with something to compare.
        StorageError: the samples or videos cannot be read, or the page cannot be written.
    """
    rows = people.samples_to_compare(evaluation)
    _check("policy", policies, rows)
    _check("set", [only_set] if only_set else [], rows)
    if len(set(policies)) < 2:
        raise VotesError("give two policies or more to compare, such as --policies query,dpo")
    if limit is not None and limit < 1:
        raise VotesError(f"a limit of {limit} leaves no pair")
    chosen = [row for row in rows if only_set in (None, row["set"])]
    pairs, left_out = people.blind_pairs(chosen, what, policies)
    shown: list[Row] = []
    for pair in pairs:
        if limit is not None and len(shown) == limit:
            break
        left, right = (_content(evaluation, to, what, row) for row in (pair.left, pair.right))
        if left is None or right is None:
            left_out["a video is no longer in the store"] += 1
        else:
            shown.append(_shown(pair, left, right))
    if not shown:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise VotesError(f"there is no pair of {what}s to show: {why or 'the policies share no query'}")
    page = content_id("page of pairs", [pair["id"] for pair in shown])
    data = {"page": page, "what": what, "pairs": shown}
    to.write(PAGE, render_page("compare.html", ["report.css", "compare.css"], ["compare.js"], data=data))
    return ComparePage(to.at(PAGE), len(shown), left_out)


def _check(column: str, given: Sequence[str], rows: Sequence[Row]) -> None:
    known = sorted({row[column] for row in rows})
    for name in given:
        if name not in known:
            raise VotesError(f"the samples have no {column} {name!r}, but {', '.join(known)}")


def _content(evaluation: Folder, to: Folder, what: What, row: Row) -> str | None:
    """The prompt, or the name of the video's copy beside the page."""
    return (
        row["prompt"] if what == "prompt" else copy_video(to, row["video_key"], video_stores(evaluation, row))
    )


def _shown(pair: BlindPair, left: str, right: str) -> Row:
    return {"id": pair.pair_id, "query": pair.left["query"], "left": left, "right": right}
