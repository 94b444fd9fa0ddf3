"""The gallery of an evaluation: what two policies made of a query side by side, the worst losses first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vpo_ray.evaluation.blocks import is_of_prompt
from vpo_ray.evaluation.signs import WORD, words
from vpo_ray.files.folder import Folder, join
from vpo_ray.records import Row
from vpo_ray.report.page import copy_video, video_stores

# Cards of the whole page, and of two policies on one set and video model at least.
WORST, BEST = 100, 50
FEWEST_WORST, FEWEST_BEST = 4, 2
LONGEST, MAX_MEASURES = 4000, 8  # characters of a text; measures of a card
ALIGNED = "verdict.aligned"
Key = tuple[str, int]  # query and seed


class PolicyPair(NamedTuple):
    """Two policies on one set with one video model; b is compared with a."""

    set: str
    video_model: str
    a: str
    b: str


@dataclass(frozen=True)
class CardSide:
    """What one policy made: `parts` is its prompt, each part with `kept` (words of the query), `only` (words
    that the other prompt does not have), or nothing. `video` is relative to the page, `hole` says why there
    is none."""

    policy: str
    side: str  # ahead | behind | ""
    value: float | None
    worst: bool  # it has none, and counts as the worst
    verdict: str | None
    critique: str | None
    parts: list[tuple[str, str]]
    cut: int
    video: str | None
    hole: str | None


@dataclass(frozen=True)
class QueryCard:
    """A query with the samples of both policies; `difference` is above 0 where b is better."""

    group: PolicyPair
    query: str
    seed: int
    metric: str
    difference: float
    samples: tuple[CardSide, CardSide]
    measures: list[tuple[str, float | None, float | None]]
    preferred: list[str]


def groups_of(results: Mapping[str, Any]) -> list[PolicyPair]:
    """What the results compare, in their order."""
    found = (
        PolicyPair(*(entry[name] for name in ("set", "video_model", "a", "b")))
        for entry in results["comparisons"]
    )
    return list(dict.fromkeys(found))


def sorting_metric(results: Mapping[str, Any], group: PolicyPair) -> str:
    """The measure that says which policy did better on a query: a whole score from outside the training, else
    the training's reward, else whether the prompt is aligned."""
    figures = results["results"].get(group.set, {}).get(group.video_model, {})
    known = {metric for policy in (group.a, group.b) for metric in figures.get(policy, {})}
    better, trained_on = results["higher_is_better"], results["trained_on"]
    whole = [name for name in known if "." not in name and name != "errors" and better.get(name) is not None]
    return min(whole, key=lambda name: (name in trained_on, name), default=ALIGNED)


def query_cards(
    results: Mapping[str, Any], samples: Iterable[Row], comparisons: Iterable[Row], folder: Folder
) -> list[QueryCard]:
    """The worst losses and best wins of each group, from the worst on. A missing value counts as the worst
    one seen in the set, as it does in the results.

    Raises:
        StorageError: a video cannot be copied beside the page.
    """
    rows: dict[tuple[str, str], dict[str, dict[Key, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in samples:
        rows[row["set"], row["video_model"]][row["policy"]][row["query_id"], row["seed"]] = row
    answers: dict[Any, list[Row]] = defaultdict(list)
    for row in comparisons:
        answers[_asked(row["what"], row)].append(row)
    groups = [group for group in groups_of(results) if (group.set, group.video_model) in rows]
    worst = max(FEWEST_WORST, WORST // max(1, len(groups)))
    best = max(FEWEST_BEST, BEST // max(1, len(groups)))
    cards: list[QueryCard] = []
    for group in groups:
        metric = sorting_metric(results, group)
        block = rows[group.set, group.video_model]
        values = policy_values(block, metric, results["higher_is_better"].get(metric))
        a, b = block[group.a], block[group.b]
        sign = -1 if results["higher_is_better"].get(metric) is False else 1
        order = sorted(
            (sign * (values[group.b, key] - values[group.a, key]), key) for key in a.keys() & b.keys()
        )
        shown = [*order[:worst], *order[max(worst, len(order) - best) :]]
        for difference, key in shown:
            given = [row for what in ("prompt", "video") for row in answers[_asked(what, a[key])]]
            scores = (values[group.a, key], values[group.b, key])
            cards.append(_card(group, metric, difference, scores, a[key], b[key], given, folder))
    return sorted(cards, key=lambda card: card.difference)


def mark_words(text: str, query: str, other: str | None) -> list[tuple[str, str]]:
    """A prompt in parts, each with `kept`, `only` or nothing; see `CardSide`."""
    kept = set(words(query))
    others = None if other is None else set(words(other))
    parts: list[tuple[str, str]] = []
    end = 0

    def put(kind: str, part: str) -> None:
        if part and parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + part)
        elif part:
            parts.append((kind, part))

    for match in WORD.finditer(text):
        word, gap = match[0].casefold(), text[end : match.start()]
        kind = "kept" if word in kept else "only" if others is not None and word not in others else ""
        put(kind if parts and parts[-1][0] == kind else "", gap)
        put(kind, match[0])
        end = match.end()
    put("", text[end:])
    return parts


def _asked(what: str, row: Row) -> Any:
    """What an answer is about. Prompts are compared once a query, whatever the video model and seed."""
    where = () if what == "prompt" else (row["video_model"], row["seed"])
    return (what, row["set"], row["query_id"], *where)


def _measures(row: Row) -> dict[str, float]:
    found = {item["name"]: item["value"] for item in row["measures"] or ()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def policy_values(
    block: Mapping[str, Mapping[Key, Row]], metric: str, higher_is_better: bool | None
) -> dict[tuple[str, Key], float]:
    def value(row: Row) -> float | None:
        return float(row["verdict"] == "aligned") if metric == ALIGNED else _measures(row).get(metric)

    raw = {(policy, key): value(row) for policy, of_key in block.items() for key, row in of_key.items()}
    seen = [number for number in raw.values() if number is not None]
    worst = (max if higher_is_better is False else min)(seen, default=0.0)
    return {place: worst if number is None else number for place, number in raw.items()}


def _card(
    group: PolicyPair,
    metric: str,
    difference: float,
    scores: tuple[float, float],
    a: Row,
    b: Row,
    given: Sequence[Row],
    folder: Folder,
) -> QueryCard:
    sides = ("", "") if not difference else ("behind", "ahead") if difference > 0 else ("ahead", "behind")
    both = ((a, b, sides[0], scores[0]), (b, a, sides[1], scores[1]))
    shown = [_sample(row, other, side, metric, score, folder) for row, other, side, score in both]
    return QueryCard(
        group=group,
        query=a["query"][:LONGEST],
        seed=a["seed"],
        metric=metric,
        difference=difference,
        samples=(shown[0], shown[1]),
        measures=_both(_measures(a), _measures(b)),
        preferred=list(_preferred(group, given)),
    )


def _sample(row: Row, other: Row, side: str, metric: str, value: float, folder: Folder) -> CardSide:
    prompt = row["prompt"] or ""
    video = _video(row, folder)
    hole = None
    if video is None and row["error"]:
        hole = f"failed in {row['error_stage'] or 'an unknown stage'}: {row['error'][:300]}"
    elif video is None and (row["skipped"] or row["video_key"]):
        hole = row["skipped"] or "the video is no longer in the store"
    return CardSide(
        policy=row["policy"],
        side=side,
        value=None if metric == ALIGNED else value,
        worst=metric != ALIGNED and metric not in _measures(row),
        verdict=row["verdict"],
        critique=None if row["verdict"] == "aligned" else (row["critique"] or "")[:LONGEST] or None,
        parts=mark_words(prompt[:LONGEST], row["query"], other["prompt"]),
        cut=max(0, len(prompt) - LONGEST),
        video=video,
        hole=hole,
    )


def _video(row: Row, folder: Folder) -> str | None:
    """The page's way to a video: in the store of the run around the evaluation, or copied beside the page."""
    key = row["video_key"]
    if not key:
        return None
    own = f"../../videos/{key[:2]}/{key}.mp4"
    if folder.is_local and Folder(join(folder.uri, "../..")).exists(own.removeprefix("../../")):
        return own
    return copy_video(folder, key, video_stores(folder, row))


def _both(a: Mapping[str, float], b: Mapping[str, float]) -> list[tuple[str, float | None, float | None]]:
    """Measures of both videos: whole scores, then the dimensions that differ most."""
    whole = sorted(name for name in a.keys() | b.keys() if "." not in name)
    parts = [name for name in a.keys() & b.keys() if "." in name and not is_of_prompt(name)]
    names = [*whole, *sorted(parts, key=lambda name: (-abs(a[name] - b[name]), name))]
    return [(name, a.get(name), b.get(name)) for name in names[:MAX_MEASURES]]


def _preferred(group: PolicyPair, given: Sequence[Row]) -> Iterator[str]:
    """What was preferred by whom, one line for prompts and one for videos."""
    for what in ("prompt", "video"):
        winners = Counter(
            (row["by"], row[row["answer"]] if row["answer"] in ("a", "b") else "tie")
            for row in given
            if row["what"] == what and {row["a"], row["b"]} == {group.a, group.b} and row["answer"]
        )
        if winners:
            said = ", ".join(
                f"{by}: {winner}" + f" ({count}×)" * (count > 1)
                for (by, winner), count in sorted(winners.items())
            )
            yield f"{what} preferred by {said}"
