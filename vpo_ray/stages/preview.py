"""Previews: which candidates of a query are rendered in full, by a cheaper look at all of them.

Between judge and render, where the recipe has `render.preview`. The distinct prompts of a query are rendered
with the preview's settings and scored as full renders are. Of the probe's queries all candidates are rendered
in full as well, which says how far previews order them as full renders do: `order_agreement`. Of every other
query `render.preview.keep` prompts are: the best and the worst by their previews. Whether one is depends on
the previews of its query alone. Pairs are made of full renders only. Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import sqrt
from statistics import NormalDist
from typing import Any

from vpo_ray.recipe import Formula, Pair, Preview, Recipe
from vpo_ray.recipe.formula import reward_of
from vpo_ray.records import Row
from vpo_ray.stages.adaptive import ALONE, TWIN, renderable_prompts, why_no_video
from vpo_ray.stages.agreement import CONFIDENCE
from vpo_ray.stages.gate import is_below
from vpo_ray.stages.pair import by_rule, is_scored, pairs_of_query
from vpo_ray.storage.run_dir import RunDir

BETWEEN = "not needed: its preview is neither the best nor the worst of its query"
ALIKE = "not needed: the previews of its query are alike"
UNSCORED = "not needed: its preview has no score"

# In the run directory: what the probe found.
MEASURED = "preview.json"


def preview_recipe(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe by which previews are made, in a run directory of their own in the run's.

    They share its video store, and are scored by those of its rewards that decide on pairs. The name of the
    directory follows from all that a preview's score depends on.
    """
    pair, formula = recipe.pair, recipe.formula
    deciding = {pair.reward}
    if pair.by == "formula" and formula is not None:
        deciding = set(map(reward_of, formula.names()))
    own = recipe.model_copy(
        update={
            "render": recipe.render.previewed().model_copy(
                update={"store": recipe.render.store or run.at("videos")}
            ),
            "more_rewards": {n: reward for n, reward in recipe.more_rewards.items() if n in deciding},
        }
    )
    name = own.fingerprint("seed", "gate", "render", "reward", "more_rewards")
    return own.model_copy(update={"out": run.at(f"preview/{name}")})


def preview_run(recipe: Recipe, run: RunDir) -> RunDir:
    """The run directory of a run's previews, with the same shard."""
    return RunDir(preview_recipe(recipe, run).out, run.shard)


def preview_row(row: Row) -> Row:
    """A candidate as it enters the previews: without what the stages before took."""
    return {**row, "seconds": None, "usage": None}


def prompts_to_preview(candidates: Sequence[Row], settings: Pair, formula: Formula | None) -> list[Row]:
    """The first candidate of each distinct prompt of a query; none where its texts alone say that no video is
    needed."""
    prompts, _ = _prompts(candidates)
    return [] if why_no_video(candidates, prompts, settings, formula) is not None else prompts


def _prompts(candidates: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """See `renderable_prompts`. What the gate has stopped by now is still a prompt of its query: its preview
    says the same."""
    return renderable_prompts([{**row, "skipped": None} for row in candidates])


def decide_by_previews(
    candidates: Sequence[Row],
    previews: Mapping[str, Row] | None,
    settings: Preview,
    pair: Pair,
    formula: Formula | None = None,
) -> dict[str, str | None]:
    """What to do with the candidates of one query.

    Args:
        candidates: all of them.
        previews: by candidate id, the rows of their previews; None of a query of the probe.
        formula: see `pairs_of_query`.

    Returns:
        By candidate id: None to let it into the render stage, or the reason why it is not needed. Nothing
        of a query whose previews are not finished, and of candidates that the gate stopped.
    """
    wanted = prompts_to_preview(candidates, pair, formula)
    if previews is not None and any(row["candidate_id"] not in previews for row in wanted):
        return {}
    prompts, twins = _prompts(candidates)
    decisions: dict[str, str | None] = {row["candidate_id"]: None for row in candidates}
    decisions |= {row["candidate_id"]: TWIN for row in twins}
    if not wanted:
        reason = why_no_video(candidates, prompts, pair, formula)
        decisions |= {row["candidate_id"]: reason for row in prompts}
    elif previews is not None:
        seen = [previews[row["candidate_id"]] for row in prompts]
        decisions |= _by_scores(seen, settings, pair, formula)
    stopped = {row["candidate_id"] for row in candidates if is_below(row)}
    return {candidate: reason for candidate, reason in decisions.items() if candidate not in stopped}


def _by_scores(
    previews: Sequence[Row], settings: Preview, pair: Pair, formula: Formula | None
) -> dict[str, str | None]:
    """What to do with the prompts of a query whose previews are finished."""
    # The render stage says of these what the preview's said.
    decisions: dict[str, str | None] = {row["candidate_id"]: None for row in previews if is_below(row)}
    ranked = _ranked_previews(previews, pair, formula)
    seen = {row["candidate_id"] for row in ranked}
    left = [row for row in previews if row["candidate_id"] not in decisions]
    decisions |= {row["candidate_id"]: UNSCORED for row in left if row["candidate_id"] not in seen}
    if len(ranked) < 2:
        return decisions | {row["candidate_id"]: ALONE for row in ranked}
    spread = ranked[0]["score"] - ranked[-1]["score"]
    if settings.margin is not None and spread <= settings.margin:
        return decisions | {row["candidate_id"]: ALIKE for row in ranked}
    chosen = {row["candidate_id"] for row in extremes(ranked, settings.keep)}
    names = (row["candidate_id"] for row in ranked)
    return decisions | {name: None if name in chosen else BETWEEN for name in names}


def videos_by_previews(candidates: Sequence[Row]) -> dict[str, int]:
    """Full renders that a query would take without previews (`all`), and those that it took, by its finished
    candidates."""
    prompts, _ = _prompts(candidates)
    made = sum(row["score"] is not None or row["error"] is not None for row in prompts)
    return {"all": len(prompts), "preview": made}


def extremes(ranked: Sequence[Row], keep: int) -> list[Row]:
    """The first, the last, the second, the last but one and so on: `keep` of them, or all."""
    last = len(ranked) - 1
    order = [index for first in range(len(ranked)) for index in (first, last - first)]
    return [ranked[index] for index in list(dict.fromkeys(order))[:keep]]


def _ranked_previews(rows: Iterable[Row], pair: Pair, formula: Formula | None) -> list[Row]:
    """Rows with a score by what decides on pairs, the best first; of equals the first candidate."""
    ordered = sorted(rows, key=lambda row: row["k"])
    scored = [row for row in by_rule(ordered, pair, formula)[0] if is_scored(row)]
    return sorted((row for row in scored if row["error"] is None), key=lambda row: -row["score"])


def order_agreement(queries: Iterable[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """How far previews order the candidates of a query as full renders do.

    Of all two candidates of a query whose full scores differ: the share that their previews order the same
    way, where a tie of previews counts a half (the concordance index).

    Args:
        queries: for each of them (score of the preview, score of the full render) of its candidates.

    Returns:
        `agreement`, and its interval from `low` to `high`: Wilson's, for the effective number of pairs, since
        those of a query are not independent. `pairs`, `ties` of previews among them, and `queries` that have
        any. None where there are no such pairs.
    """
    agreed, sizes, ties = [], [], 0
    for scores in queries:
        same = [_same_order(a, b) for a, b in combinations(scores, 2) if a[1] != b[1]]
        if same:
            agreed.append(sum(same))
            sizes.append(len(same))
            ties += same.count(0.5)
    found = {"pairs": sum(sizes), "ties": ties, "queries": len(sizes)}
    if not sizes:
        return {"agreement": None, "low": None, "high": None, **found}
    share = sum(agreed) / sum(sizes)
    low, high = _wilson(share, _effective(agreed, sizes, share))
    return {"agreement": round(share, 4), "low": round(low, 4), "high": round(high, 4), **found}


def told(figures: Mapping[str, Any]) -> str:
    """What the probe says, in a sentence."""
    if figures["agreement"] is None:
        return "the probe says nothing of previews"
    return (
        f"previews order {figures['agreement']:.3g} of a query's pairs of candidates as full renders do "
        f"(95 % interval {figures['low']:.2f} to {figures['high']:.2f}; {figures['pairs']} pairs of "
        f"{figures['queries']} queries), and find {figures['paired_by_previews']} of the {figures['paired']} "
        "video pairs that all full renders give"
    )


def _same_order(a: tuple[float, float], b: tuple[float, float]) -> float:
    if a[0] == b[0]:
        return 0.5
    return float((a[0] > b[0]) == (a[1] > b[1]))


def _effective(agreed: Sequence[float], sizes: Sequence[int], share: float) -> float:
    """How many independent pairs would say as much: from the variance between queries, and never more than
    there are, nor fewer than queries. Where all agree, or none, that variance says nothing: the queries."""
    count = len(sizes)
    spread = sum((a - share * n) ** 2 for a, n in zip(agreed, sizes, strict=True))
    if count < 2 or share in (0.0, 1.0) or not spread:
        return float(count)
    variance = spread * count / (count - 1) / sum(sizes) ** 2
    return float(min(max(share * (1 - share) / variance, count), sum(sizes)))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share of n (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def probe_figures(
    queries: Iterable[tuple[Mapping[str, Row], Sequence[Row]]],
    settings: Preview,
    pair: Pair,
    formula: Formula | None = None,
) -> dict[str, Any]:
    """What the probe says: `order_agreement`, and of how many queries there is a video pair of all full
    renders (`paired`), and of those alone that previews would have kept (`paired_by_previews`).

    Args:
        queries: for each of them, the previews by candidate id, and all candidates with their full renders.
    """
    scores: list[list[tuple[float, float]]] = []
    paired = kept = 0
    for previews, candidates in queries:
        prompts = prompts_to_preview(candidates, pair, formula)
        seen = _scores([previews[row["candidate_id"]] for row in prompts], pair, formula)
        full = _scores(prompts, pair, formula)
        scores.append([(seen[name], full[name]) for name in seen.keys() & full.keys()])
        decisions = decide_by_previews(candidates, previews, settings, pair, formula)
        rendered = [row for row in candidates if decisions.get(row["candidate_id"]) is None]
        paired += _has_video_pair(candidates, pair, formula)
        kept += _has_video_pair(rendered, pair, formula)
    return {**order_agreement(scores), "paired": paired, "paired_by_previews": kept}


def _scores(rows: Sequence[Row], pair: Pair, formula: Formula | None) -> dict[str, float]:
    return {row["candidate_id"]: row["score"] for row in _ranked_previews(rows, pair, formula)}


def _has_video_pair(rows: Sequence[Row], pair: Pair, formula: Formula | None) -> bool:
    return any(found["kind"] == "video" for found in pairs_of_query(rows, pair, Counter(), formula))
