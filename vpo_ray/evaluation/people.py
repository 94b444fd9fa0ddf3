"""What people prefer: blind pairs of an evaluation's samples, and the votes that come back.

`vpo compare page` shows the pairs (`report.compare_page`), and `vpo compare votes` reads the votes. Neither
the page nor the votes name a policy: which one is shown first follows from the pair's content, here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from itertools import combinations
from typing import Any, Literal, NamedTuple

from vpo_ray.evaluation.samples import COMPARISON, SAMPLE
from vpo_ray.files.folder import Folder
from vpo_ray.records import Row, content_id, normalise, share_of
from vpo_ray.storage.tables import Table

What = Literal["prompt", "video"]
VOTES = {"left": "a", "right": "b", "tie": "tie"}
LONGEST_NAME = 100
_COLUMNS = ["sample_id", "set", "policy", "video_model", "query_id", "query", "seed"]
_COLUMNS += ["prompt", "video_key", "video_uri"]


class VotesError(ValueError):
    """Samples without pairs, or a file that holds no votes on them; the message says which."""


class BlindPair(NamedTuple):
    """Two samples of one query, with the same video model and seed; the left one is shown first."""

    pair_id: str
    what: What
    left: Row
    right: Row


class Votes(NamedTuple):
    """Votes as rows of COMPARISON, and how many were not taken, by reason."""

    rows: list[Row]
    left_out: Counter[str]


def samples_to_compare(evaluation: Folder) -> list[Row]:
    """The samples of an evaluation's folder, with the columns that pairs need.

    Raises:
        VotesError: it has none.
        StorageError: they cannot be read.
    """
    found = list(Table(evaluation.at("samples"), SAMPLE, "sample_id").rows(_COLUMNS))
    if not found:
        raise VotesError(
            f"{evaluation.uri} has no samples: give the folder of an evaluation, <run>/evaluation/<id>"
        )
    return found


def votes_table(evaluation: Folder) -> Table:
    """The votes of people on an evaluation's samples, beside them."""
    return Table(evaluation.at("people"), COMPARISON, "comparison_id")


def blind_pairs(
    samples: Iterable[Row], what: What, policies: Container[str] | None = None
) -> tuple[list[BlindPair], Counter[str]]:
    """All pairs of two policies' samples, in the order of their ids, which are hashes of content.

    Prompts are compared once a query, whatever the number of video models and seeds.

    Returns:
        The pairs, and how many others have nothing to compare, by reason.
    """
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(
        samples, key=lambda row: (row["video_model"] != "render", row["video_model"], row["seed"])
    ):
        if policies is None or row["policy"] in policies:
            shown_with = () if what == "prompt" else (row["video_model"], str(row["seed"]))
            group = groups.setdefault((row["set"], row["query_id"], *shown_with), {})
            group.setdefault(row["policy"], row)
    content = "prompt" if what == "prompt" else "video_key"
    found: list[BlindPair] = []
    left_out: Counter[str] = Counter()
    for group in groups.values():
        for one, other in combinations([group[policy] for policy in sorted(group)], 2):
            if not one[content] or not other[content]:
                left_out[f"a policy has no {what}"] += 1
            elif one[content] == other[content]:
                left_out[f"both have the same {what}"] += 1
            else:
                found.append(_pair(what, one, other, content))
    return sorted(found, key=lambda pair: pair.pair_id), left_out


def _pair(what: What, one: Row, other: Row, content: str) -> BlindPair:
    place = [one[name] for name in ("set", "video_model", "query_id", "seed")]
    pair_id = content_id("pair", what, place, *([row["policy"], row[content]] for row in (one, other)))
    left, right = (one, other) if share_of("left", pair_id) < 0.5 else (other, one)
    return BlindPair(pair_id, what, left, right)


def read_votes(files: Mapping[str, bytes], samples: list[Row]) -> Votes:
    """The votes of files that the page of pairs made. Of a rater's votes on one pair, the last file's counts.

    Args:
        files: contents by name.

    Raises:
        VotesError: a file that is no file of votes, or none of whose votes is on a pair of these samples.
    """
    known = {pair.pair_id: pair for what in ("prompt", "video") for pair in blind_pairs(samples, what)[0]}
    left_out: Counter[str] = Counter()
    rows: dict[str, Row] = {}
    for name, data in files.items():
        rater, votes = _parse(name, data)
        unknown = votes.keys() - known.keys()
        if votes and len(unknown) == len(votes):
            raise VotesError(
                f"{name}: none of its {len(votes)} votes is on a pair of these samples; give the samples "
                "that its page was made of"
            )
        left_out["on a pair that these samples do not have"] += len(unknown)
        for pair_id in votes.keys() - unknown:
            row = _row(known[pair_id], rater, votes[pair_id])
            before = rows.get(row["comparison_id"])
            if before is not None:
                same = before["answer"] == row["answer"]
                left_out[f"given again, {'the same' if same else 'and changed'}"] += 1
            rows[row["comparison_id"]] = row
    return Votes([rows[key] for key in sorted(rows)], +left_out)


def _parse(name: str, data: bytes) -> tuple[str, dict[str, str]]:
    """Rater and answers by pair. Raises VotesError."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VotesError(f"{name} is no file of votes, it is not JSON: {error}") from error
    votes = given.get("votes") if isinstance(given, dict) else None
    if not isinstance(votes, list):
        raise VotesError(f'{name} is no file of votes: it has no list "votes"')
    rater = given.get("rater")
    try:
        rater = normalise(rater) if isinstance(rater, str) else ""
    except UnicodeEncodeError:
        rater = ""
    if not 0 < len(rater) <= LONGEST_NAME:
        raise VotesError(f'{name}: "rater" is not a name of 1 to {LONGEST_NAME} characters')
    answers: dict[str, str] = {}
    for number, vote in enumerate(votes, 1):
        pair_id, answer = (vote.get("pair"), vote.get("vote")) if isinstance(vote, dict) else (None, None)
        if not isinstance(pair_id, str) or not isinstance(answer, str) or answer not in VOTES:
            raise VotesError(f"{name}: vote {number} is not a pair's id with one of {', '.join(VOTES)}")
        if answers.setdefault(pair_id, answer) != answer:
            raise VotesError(f"{name}: the pair {pair_id[:40]} has two votes that differ")
    return rater, answers


def _row(pair: BlindPair, rater: str, answer: str) -> Row:
    shared: dict[str, Any] = {
        name: pair.left[name] for name in ("set", "video_model", "query_id", "query", "seed")
    }
    return {
        **shared,
        "comparison_id": content_id("vote", pair.pair_id, rater),
        "what": pair.what,
        "by": rater,
        "a": pair.left["policy"],
        "b": pair.right["policy"],
        "answer": VOTES[answer],
    }
