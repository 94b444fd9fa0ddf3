"""The gallery: a fair sample of a run's pairs, each with all that led to it.

Pairs are taken by the order of their ids, which are hashes of content: nobody picked the good ones,
and the same run shows the same pairs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from vpo_ray.engines.reward import checklist
from vpo_ray.recipe import Recipe
from vpo_ray.records import Row
from vpo_ray.report.page import copy_video
from vpo_ray.stages.pair import by_rule
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore

MAX_PAIRS, MAX_VIDEO_PAIRS, MAX_ANSWERS = 24, 16, 6


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected half of a card. `video` is relative to the page."""

    role: str
    prompt: str
    score: float | None
    video: str | None
    video_missing: bool
    more_scores: tuple[tuple[str, float], ...]  # of the recipe's more_rewards


@dataclass(frozen=True)
class Card:
    pair_id: str
    query: str
    kind: str
    margin: float | None
    sides: tuple[Side, Side]
    verdict: str | None
    critique: str | None
    answers: list[tuple[str, bool, bool]]  # question, chosen, rejected
    more_answers: int
    dimensions: list[tuple[str, float, float]]


def cards(run: RunDir, recipe: Recipe) -> list[Card]:
    """At most MAX_PAIRS cards, video pairs first, widest margin first."""
    pairs = _sample(run)
    where = pc.field("query_id").isin(sorted({pair["query_id"] for pair in pairs}))
    of_query: defaultdict[str, list[Row]] = defaultdict(list)
    for row in run.table("feedback").rows(where=where) if pairs else ():
        of_query[row["query_id"]].append(row)
    formula = recipe.formula and recipe.formula.at(run.round_number())
    decided = (by_rule(rows, recipe.pair, formula)[0] for rows in of_query.values())
    feedback = {row["candidate_id"]: row for rows in decided for row in rows}
    questions = _questions(recipe)
    made = [_card(pair, feedback, run, recipe, questions) for pair in pairs]
    return sorted(made, key=lambda card: (card.kind != "video", -(card.margin or 0), card.pair_id))


def _sample(run: RunDir) -> list[Row]:
    def smallest(kind: str, count: int) -> list[Row]:
        rows = run.table("pairs").rows(where=pc.field("kind") == kind)
        return heapq.nsmallest(count, rows, key=lambda row: row["pair_id"])

    video, text = smallest("video", MAX_PAIRS), smallest("text", MAX_PAIRS)
    video = video[: max(MAX_VIDEO_PAIRS, MAX_PAIRS - len(text))]
    return video + text[: MAX_PAIRS - len(video)]


def _card(
    pair: Row,
    feedback: Mapping[str, Row],
    run: RunDir,
    recipe: Recipe,
    questions: Mapping[int, tuple[str, float]],
) -> Card:
    chosen, rejected = feedback.get(pair["chosen_id"], {}), feedback.get(pair["rejected_id"], {})
    is_video = pair["kind"] == "video"
    answers = _differences(chosen, rejected, questions) if is_video else []
    return Card(
        pair_id=pair["pair_id"],
        query=pair["query"],
        kind=pair["kind"],
        margin=pair["margin"],
        sides=(
            _side("chosen", pair["chosen"], chosen if is_video else {}, run, recipe),
            _side("rejected", pair["rejected"], rejected if is_video else {}, run, recipe),
        ),
        verdict=None if is_video else rejected.get("verdict"),
        critique=None if is_video else rejected.get("critique"),
        answers=answers[:MAX_ANSWERS],
        more_answers=max(0, len(answers) - MAX_ANSWERS),
        dimensions=_dimensions(chosen, rejected) if is_video else [],
    )


def _side(role: str, prompt: str, row: Mapping[str, Any], run: RunDir, recipe: Recipe) -> Side:
    key = row.get("video_key")
    video = _video(run, recipe, key) if key else None
    more = tuple((reward["name"], reward["score"]) for reward in row.get("more_rewards") or ())
    return Side(role, prompt, row.get("score"), video, key is not None and video is None, more)


def _video(run: RunDir, recipe: Recipe, key: str) -> str | None:
    """The page's way to a video: in the run's own store, or copied beside the page from a store
    that other runs share. None when the store has it no more."""
    if recipe.render.store is None:
        name = f"videos/{key[:2]}/{key}.mp4"
        return f"../{name}" if run.exists(name) else None
    return copy_video(run / "report", key, [VideoStore(recipe.render.store)])


def _differences(
    chosen: Row, rejected: Row, questions: Mapping[int, tuple[str, float]]
) -> list[tuple[str, bool, bool]]:
    """Questions answered differently, the heaviest first; the query's place in them is left open."""
    other = {answer["question"]: answer["yes"] for answer in rejected.get("answers") or []}
    found = []
    for answer in chosen.get("answers") or []:
        number, yes = answer["question"], answer["yes"]
        if number in other and other[number] != yes:
            text, weight = questions.get(number, (f"Question {number}", 0.0))
            found.append((-abs(weight), number, text.replace(checklist.SLOT, "…"), yes, other[number]))
    return [(text, yes, no) for _, _, text, yes, no in sorted(found)]


def _dimensions(chosen: Row, rejected: Row) -> list[tuple[str, float, float]]:
    other = {item["name"]: item["score"] for item in rejected.get("dimensions") or []}
    mine = chosen.get("dimensions") or []
    return [(item["name"], item["score"], other[item["name"]]) for item in mine if item["name"] in other]


def _questions(recipe: Recipe) -> dict[int, tuple[str, float]]:
    """Number: question and weight. A report is also made where the checklist cannot be read any
    more; its questions are then shown by number."""
    try:
        decides = recipe.pair.reward
        reward = recipe.reward if decides is None else recipe.more_rewards[decides]
        loaded = checklist.load_checklist(reward.checklist)
    except (checklist.ChecklistError, OSError):
        return {}
    return {number: (q.text, q.weight) for number, q in enumerate(loaded.questions, 1)}
