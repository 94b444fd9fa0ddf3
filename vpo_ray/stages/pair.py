"""Pair: finished candidates of one query become preference pairs. Pure functions.

Two kinds. A text pair sets a refined prompt that was judged aligned over the misaligned original
(VPO 3.3, prompt level), or, of a query with a profile, an aligned prompt over one that does not meet the
profile. A video pair sets a prompt over another of the same query whose video the
reward model, or the recipe's formula over several, scored lower by more than a margin (VPO 3.3, video level;
the dominance rule is in its released code only).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations

from vpo_ray.recipe import Formula, Pair
from vpo_ray.records import Row, pair_id, share_of
from vpo_ray.stages.formula import rows_by_formula


def pairs_of_query(
    candidates: Sequence[Row], settings: Pair, reasons: Counter[str], formula: Formula | None = None
) -> list[Row]:
    """The pairs of one query's candidates.

    Args:
        candidates: Feedback rows of one query, in any order.
        reasons: counts why comparisons gave no pair; it is added to.
        formula: with the weights of the round, where `pair.by` says that it decides.

    Returns:
        Pair rows, text pairs first.
    """
    ordered = sorted(candidates, key=lambda row: row["k"])
    ordered, left_out = by_rule(ordered, settings, formula)
    reasons.update(left_out)
    text = _choose(_text_pairs(ordered, settings, reasons), settings.text_per_query, best=False)
    count = None if settings.choice == "all" else settings.video_per_query
    video = _choose(_video_pairs(ordered, settings, reasons), count, settings.choice == "best")
    if text and video and settings.precedence != "both":
        loser = video if settings.precedence == "text" else text
        reasons[f"superseded by the {settings.precedence} pair"] += len(loser)
        loser.clear()
    return text + video


def by_rule(rows: Sequence[Row], settings: Pair, formula: Formula | None) -> tuple[list[Row], list[str]]:
    """Rows of one query with the score columns of what decides; see `by_reward` and `rows_by_formula`.

    Returns:
        The rows, and why some have no score by the formula.
    """
    if settings.by == "score":
        return [by_reward(row, settings.reward) for row in rows], []
    if formula is None:
        raise ValueError("pair.by: formula needs the recipe's formula")
    return rows_by_formula(rows, formula)


def by_reward(row: Row, name: str | None) -> Row:
    """The row with the score columns of the reward that decides: `name` of `more_rewards`, or as it is."""
    if name is None:
        return row
    found: Row = next((reward for reward in row["more_rewards"] or [] if reward["name"] == name), {})
    return {**row, **{column: found.get(column) for column in ("reward", "answers", "dimensions", "score")}}


def is_scored(row: Row) -> bool:
    """Whether a row has a score that can be compared. Rewards of others may have written another number."""
    return row["score"] is not None and math.isfinite(row["score"])


def _text_pairs(rows: Sequence[Row], settings: Pair, reasons: Counter[str]) -> Iterator[Row]:
    refined = [row for row in rows if row["refined_prompt"] is not None and row["error"] is None]
    # One of several misaligned candidates is taken by content, as a shuffle would, not by index.
    for row in sorted(refined, key=_by_content):
        if row["refined_fault"] is not None:
            reasons[f"refined prompt: {row['refined_fault']}"] += 1
        elif row["refined_verdict"] != "aligned":
            reasons["refined prompt not aligned"] += 1
        elif row["refined_prompt"] == row["prompt"]:
            reasons["refined prompt equal to the original"] += 1
        elif why := _too_long(row["refined_prompt"], settings):
            reasons[why] += 1
        else:
            yield _pair("text", row, row, row["refined_prompt"], row["prompt"], None)
    yield from _profile_pairs(rows, settings)


def _by_content(row: Row) -> float:
    return share_of("text pair", row["candidate_id"])


def _profile_pairs(rows: Sequence[Row], settings: Pair) -> Iterator[Row]:
    """What meets the query's profile over what does not, both as the policy wrote them."""
    wrote = [row for row in rows if row.get("unmet") is not None and row["error"] is None]
    missed = sorted((row for row in wrote if row.get("unmet")), key=_by_content)
    for row in sorted(wrote, key=_by_content):
        if row["verdict"] == "aligned" and not row.get("unmet") and not _too_long(row["prompt"], settings):
            yield from (_pair("text", row, other, row["prompt"], other["prompt"], None) for other in missed)


def _video_pairs(rows: Sequence[Row], settings: Pair, reasons: Counter[str]) -> Iterator[Row]:
    scored = [row for row in rows if is_scored(row) and row["error"] is None]
    if len(scored) < 2:
        reasons["fewer than two scored videos"] += 1
        return
    found = False
    may_be_chosen = _ranked(scored, settings.ranks)
    for chosen, rejected in permutations(scored, 2):
        margin = chosen["score"] - rejected["score"]
        if chosen["prompt"] == rejected["prompt"] or margin <= 0:
            continue
        if margin <= settings.margin:
            reasons["margin too small"] += 1
        elif not dominates(chosen, rejected, settings.dominance):
            reasons["not dominant"] += 1
        elif chosen["prompt"] not in may_be_chosen:
            reasons["chosen not among the best"] += 1
        elif why := chosen.get("refused") or _too_long(chosen["prompt"], settings):
            reasons[f"chosen: {why}"] += 1
        else:
            found = True
            yield _pair("video", chosen, rejected, chosen["prompt"], rejected["prompt"], margin)
    if not found:
        reasons["query without a video pair"] += 1


def _ranked(rows: Sequence[Row], ranks: int | None) -> set[str]:
    """The prompts of the so many best rows; all without a number. Of equals the first comes first, as in
    Prompt-A-Video's filter, and a prompt that was sampled twice has one rank."""
    best = dict.fromkeys(row["prompt"] for row in sorted(rows, key=lambda row: -row["score"]))
    return set(list(best)[:ranks])


def _too_long(prompt: str, settings: Pair) -> str | None:
    if settings.max_words is None or len(prompt.split()) <= settings.max_words:
        return None
    return f"a prompt of more than {settings.max_words} words"


def dominates(chosen: Row, rejected: Row, level: str) -> bool:
    """True when `chosen` is nowhere worse and somewhere better, by question or by dimension.

    Question level compares yes/no answers over the whole checklist, as VPO's code does.
    """
    if level == "none":
        return True
    if level == "question":
        a = {answer["question"]: float(answer["yes"]) for answer in chosen["answers"]}
        b = {answer["question"]: float(answer["yes"]) for answer in rejected["answers"]}
    else:
        a = {dimension["name"]: dimension["score"] for dimension in chosen["dimensions"]}
        b = {dimension["name"]: dimension["score"] for dimension in rejected["dimensions"]}
    return a.keys() == b.keys() and all(a[q] >= b[q] for q in a) and any(a[q] > b[q] for q in a)


def _choose(found: Iterable[Row], count: int | None, best: bool) -> list[Row]:
    """At most `count` pairs, or all, the widest margins first when `best`, each pair of texts once."""
    first: dict[tuple[str, str], Row] = {}
    for row in found:
        first.setdefault((row["chosen"], row["rejected"]), row)
    rows = list(first.values())
    if best:
        rows.sort(key=lambda row: -(row["margin"] or 0.0))
    return rows[:count]


def _pair(
    kind: str, chosen: Row, rejected: Row, chosen_text: str, rejected_text: str, margin: float | None
) -> Row:
    return {
        "pair_id": pair_id(
            kind, chosen["candidate_id"], rejected["candidate_id"], chosen_text, rejected_text
        ),
        "query_id": chosen["query_id"],
        "query": chosen["query"],
        "image": chosen.get("image"),
        "chosen": chosen_text,
        "rejected": rejected_text,
        "kind": kind,
        "margin": margin,
        "chosen_id": chosen["candidate_id"],
        "rejected_id": rejected["candidate_id"],
        "profile": chosen.get("profile"),
        "conditions": chosen.get("conditions"),
    }
