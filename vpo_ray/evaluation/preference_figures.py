"""What an LLM or people prefer, as figures: wins of policies against each other, flips, agreement, one order.

An LLM is asked in both orders, and a policy wins only where both answers agree. Where one of two policies
made nothing (no prompt, no video), the other wins without a question; where both made the same, they tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from vpo_ray.evaluation.blocks import Block, FiguresError
from vpo_ray.evaluation.ranking import rank_policies
from vpo_ray.evaluation.statistics import (
    Floats,
    agreement,
    both_orders,
    difference,
    flip_rate,
    per_query,
)
from vpo_ray.recipe import Evaluation
from vpo_ray.records import Row

_CONTENT = {"prompt": "prompt", "video": "video_key"}
_POINTS = {"a": -1.0, "tie": 0.0, "b": 1.0}
# By policies (a, b) in the order of the figures, then by query and seed: rows of COMPARISON.
Asked = dict[tuple[int, int], dict[tuple[int, int], list[Row]]]


def preferences(
    block: Block, rows: Sequence[Row], people: bool, settings: Evaluation
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Comparisons and, of three policies or more, their order by Bradley–Terry.

    Args:
        rows: of COMPARISON, of this block's set and video model. Prompts are compared once a query.
        people: whether they are votes; otherwise an LLM's answers in both orders.

    Raises:
        FiguresError: an answer about a policy or query that the block does not have.
    """
    compared, ranked = [], []
    for what in _CONTENT:
        asked = _asked(block, [row for row in rows if row["what"] == what])
        if not asked:
            continue
        name = f"{'people' if people else 'preference'}.{what}"
        points: dict[tuple[int, int], Floats] = {}
        for pair, answers in sorted(asked.items()):
            seeds = 1 if what == "prompt" else len(block.seeds)
            values = np.full((len(block.queries), seeds), np.nan)
            for query, seed in np.ndindex(values.shape):
                votes = answers.get((query, seed))
                if votes is not None:
                    point = _majority(votes) if people else _both(votes)
                    values[query, seed] = np.nan if point is None else point
                elif not people:
                    values[query, seed] = _unasked(block, pair, query, seed, _CONTENT[what])
            points[pair] = values
            if people:
                more = _of_people(answers)
            else:
                more = _of_llm(
                    rows
                    for (query, seed), rows in answers.items()
                    if np.isnan(_unasked(block, pair, query, seed, _CONTENT[what]))
                )
            compared.append(_comparison(block, name, pair, values, settings) | more)
        if len(block.policies) > 2:
            ranked.append(_ranking(block, name, points, settings))
    return compared, ranked


def _asked(block: Block, rows: Sequence[Row]) -> Asked:
    """The rows by what they compare, `turned` where the pair's second policy was shown first."""
    policies = {name: number for number, name in enumerate(block.policies)}
    queries = {name: number for number, name in enumerate(block.queries)}
    seeds = {name: number for number, name in enumerate(block.seeds)}
    found: Asked = {}
    for row in rows:
        seed = 0 if row["what"] == "prompt" else seeds.get(row["seed"])
        if not {row["a"], row["b"]} <= policies.keys() or row["query_id"] not in queries or seed is None:
            raise FiguresError(
                f"set {block.set}: an answer about {row['a']} and {row['b']} on the query {row['query']!r}, "
                "which this evaluation does not have"
            )
        a, b = sorted((policies[row["a"]], policies[row["b"]]))
        found.setdefault((a, b), {}).setdefault((queries[row["query_id"]], seed), []).append(
            {**row, "turned": policies[row["a"]] != a}
        )
    return found


def _answers(rows: Sequence[Row]) -> Iterator[str | None]:
    """Answers with `a` for the pair's first policy, wherever it was shown."""
    for row in rows:
        turned = {"a": "b", "b": "a"} if row["turned"] else {}
        yield turned.get(row["answer"], row["answer"])


def _orders(rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """The answers by place where the pair's first policy was shown first, and where it was second."""
    given = {row["turned"]: row["answer"] for row in rows}
    return given.get(False), given.get(True)


def _both(rows: Sequence[Row]) -> float | None:
    answer = both_orders(*_orders(rows))
    return None if answer is None else _POINTS[answer]


def _majority(rows: Sequence[Row]) -> float | None:
    votes = [_POINTS[answer] for answer in _answers(rows) if answer is not None]
    return float(np.sign(sum(votes))) if votes else None


def _unasked(block: Block, pair: tuple[int, int], query: int, seed: int, content: str) -> float:
    a, b = (block.rows[policy][query][seed][content] for policy in pair)
    if a == b:
        return 0.0
    return 1.0 if a is None else -1.0 if b is None else np.nan


def _of_llm(answers: Iterable[Sequence[Row]]) -> dict[str, Any]:
    orders = [_orders(rows) for rows in answers]
    return {"flip_rate": flip_rate(orders), "unanswered": sum(None in pair for pair in orders)}


def _of_people(answers: Mapping[tuple[int, int], Sequence[Row]]) -> dict[str, Any]:
    votes = [list(_answers(rows)) for rows in answers.values()]
    found = agreement(votes)
    return {
        "raters": len({row["by"] for rows in answers.values() for row in rows}),
        "votes": sum(map(len, votes)),
        "agreement": {"alpha": found.alpha, "share": found.share, "n": found.n},
    }


def _comparison(
    block: Block, name: str, pair: tuple[int, int], values: Floats, settings: Evaluation
) -> dict[str, Any]:
    found = difference(np.zeros_like(values), values, settings.confidence, settings.resamples)
    return comparison(block, name, pair, found)


def comparison(block: Block, metric: str, pair: tuple[int, int], found: Any) -> dict[str, Any]:
    """A `statistics.Difference` as an entry of the results."""
    return {
        "set": block.set,
        "video_model": block.video_model,
        "metric": metric,
        "a": block.policies[pair[0]],
        "b": block.policies[pair[1]],
        "difference": found.value,
        "stderr": found.stderr,
        "ci_low": found.low,
        "ci_high": found.high,
        "n": found.n,
        "win": found.win,
        "tie": found.tie,
        "loss": found.loss,
        "p": found.p,
        "smallest_detectable": found.smallest_detectable,
        "note": found.note,
    }


def _ranking(
    block: Block, name: str, points: Mapping[tuple[int, int], Floats], settings: Evaluation
) -> dict[str, Any]:
    k = len(block.policies)
    wins, ties = np.zeros((2, len(block.queries), k, k))
    for a, b in combinations(range(k), 2):
        if (a, b) in points:
            # A query is compared once, whatever its seeds: the mean of their points says who is ahead.
            point = per_query(points[a, b])
            wins[:, a, b], wins[:, b, a] = point < 0, point > 0
            ties[:, a, b] = ties[:, b, a] = point == 0
    found = rank_policies(wins, ties, settings.confidence, settings.resamples)
    order = sorted(range(k), key=lambda number: -(found[number].value or 0))
    return {
        "set": block.set,
        "video_model": block.video_model,
        "metric": name,
        "policies": [
            {
                "policy": block.policies[number],
                "strength": found[number].value,
                "ci_low": found[number].low,
                "ci_high": found[number].high,
                "n": found[number].n,
                "note": found[number].note,
            }
            for number in order
        ],
    }
