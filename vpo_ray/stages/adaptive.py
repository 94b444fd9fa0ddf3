"""Adaptive rendering: which candidates of a query are worth a video. Pure functions.

Between judge and render, where `render.strategy` is adaptive. The distinct prompts of a query that
can be rendered are taken in the order of their candidates: the first two at once, each further one
when all before it are finished and give fewer pairs than `pair.video_per_query`. Whether a prompt is
rendered depends on nothing but the results of those before it, so neither the number of replicas nor
a kill and a resume changes which videos are made. A pair is found for the same queries as when all
candidates are rendered; with `pair.choice: best`, it is the best of fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vpo_ray.recipe import Formula, Pair
from vpo_ray.records import Row
from vpo_ray.stages.gate import is_below
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.spec import names

ENOUGH = "not needed: the query has its pair"
TEXT_FIRST = "not needed: the query's text pair comes first"
ALONE = "not needed: one prompt alone makes no pair"
TWIN = "not needed: another candidate has the same prompt"
NO_VIDEO_PAIRS = "not needed: pair.video_per_query is 0"


def decide(
    candidates: Sequence[Row], settings: Pair, formula: Formula | None = None
) -> dict[str, str | None]:
    """What to do now with the candidates of one query that are neither rendered nor failed.

    Args:
        candidates: all candidates of the query, each as the last table that has it says.
        formula: see `pairs_of_query`.

    Returns:
        By candidate id: None to let it into the render stage, or the reason why it is not needed.
        A candidate that has to wait for others is absent, and so is a finished one.
    """
    prompts, twins = renderable_prompts(candidates)
    taken = {id(row) for row in (*prompts, *twins)}
    decisions: dict[str, str | None] = {
        row["candidate_id"]: None for row in candidates if id(row) not in taken and not is_below(row)
    }
    decisions |= {row["candidate_id"]: TWIN for row in twins if _is_open(row)}
    reason = why_no_video(candidates, prompts, settings, formula)
    for position, row in enumerate(prompts):
        before = prompts[:position]
        if not _is_open(row):
            continue
        if reason is None and position >= 2:
            if not all(_is_finished(earlier) for earlier in before):
                break
            if _enough(before, settings, formula):
                reason = ENOUGH
        decisions[row["candidate_id"]] = reason
    return decisions


def is_renderable(row: Row) -> bool:
    """Whether a candidate is one to make a video of: its prompt was judged aligned, nothing failed before it
    came to the render stage, and the gate did not stop it there. It may be rendered already, or have failed
    there."""
    if is_below(row):
        return False
    own = names("generation")
    failed_before = row.get("error") is not None and row.get("error_stage") not in own[own.index("render") :]
    return row.get("verdict") == "aligned" and row.get("prompt") is not None and not failed_before


def videos_by_strategy(
    candidates: Sequence[Row], settings: Pair, formula: Formula | None = None
) -> dict[str, int]:
    """Videos that either strategy asks for, computed from one query's finished candidates.

    Where the adaptive strategy made them, it is exact as well: the others were not needed.
    """
    prompts, _ = renderable_prompts(candidates)
    if why_no_video(candidates, prompts, settings, formula):
        return {"all": len(prompts), "adaptive": 0}
    needed = 2
    while needed < len(prompts) and not _enough(prompts[:needed], settings, formula):
        needed += 1
    return {"all": len(prompts), "adaptive": needed}


def renderable_prompts(candidates: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The first candidate of every prompt that is or was to be rendered, in the order of k, and those that
    repeat one."""
    first: dict[str, Row] = {}
    twins = []
    for row in sorted(candidates, key=lambda row: row["k"]):
        if not is_renderable(row):
            continue
        if first.setdefault(row["prompt"], row) is not row:
            twins.append(row)
    return list(first.values()), twins


def why_no_video(
    candidates: Sequence[Row], prompts: Sequence[Row], settings: Pair, formula: Formula | None
) -> str | None:
    """Why no video of this query is needed, as far as its texts tell."""
    if not settings.video_per_query:
        return NO_VIDEO_PAIRS
    if len(prompts) < 2:
        return ALONE
    texts = [row for row in candidates if row["refined_prompt"] is not None]
    if settings.precedence == "text" and pairs_of_query(texts, settings, Counter(), formula):
        return TEXT_FIRST
    return None


def _enough(rows: Sequence[Row], settings: Pair, formula: Formula | None) -> bool:
    if settings.choice == "all" or settings.ranks is not None:
        return False  # any further video may make a pair, or undo one
    return len(pairs_of_query(rows, settings, Counter(), formula)) >= settings.video_per_query


def _is_open(row: Row) -> bool:
    return row["video_key"] is None and row["error"] is None


def _is_finished(row: Row) -> bool:
    return row["score"] is not None or row["error"] is not None
