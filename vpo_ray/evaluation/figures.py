"""From an evaluation's samples and comparisons to its results: every figure with its interval and its test.

    {"results": {set: {video model: {policy: {metric: {"value", "stderr", "ci_low", "ci_high", "n"}}}}},
     "comparisons": [{"set", "video_model", "metric", "a", "b", "difference", …}], …}

All policies are paired by query and seed. A missing value counts as the worst one seen (see `blocks`), and
the results say where. What too few queries, ties or a constant measure cannot show is null, with a `note`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from vpo_ray.evaluation.blocks import Block, FiguresError, blocks, direction, is_of_prompt, is_share
from vpo_ray.evaluation.preference_figures import comparison, preferences
from vpo_ray.evaluation.signs import Trained, signs
from vpo_ray.evaluation.statistics import (
    Difference,
    Floats,
    Interval,
    difference,
    holm,
    mean_interval,
    per_query,
    share_interval,
    variance_parts,
)
from vpo_ray.recipe import Evaluation
from vpo_ray.records import Row

ALL_PAIRS = 4  # policies; of more, each is compared with the first only
NOTHING_OUTSIDE = (
    "no measure here is from outside the training: prompts and videos are judged by what the policies were "
    "trained to please"
)
# They describe a prompt, and do not say whether it is a good one.
_DESCRIPTIONS = frozenset({
    "errors", "prompt.words", "prompt.characters", "prompt.language_kept", "prompt.required_kept",
    "prompt.unsafe_words", "prompt.profile_met",
})  # fmt: skip
_TRAINING_ORDER = {"base": 0, "sft": 1, "dpo": 2, "rl": 2}
_DIGITS = 12


def results_of(
    samples: Sequence[Row] | pa.Table,
    comparisons: Sequence[Row] | pa.Table,
    settings: Evaluation,
    context: Mapping[str, Any],
    people: Sequence[Row] | pa.Table = (),
) -> dict[str, Any]:
    """The content of results.json.

    In a comparison `difference` is b - a and `win` counts the queries on which b is better: a is the first
    policy, or the one that comes before b in `policies`. `p` is of the exact sign test (McNemar's for
    shares), `p_holm` adjusted for all comparisons of its set and video model.

    Args:
        samples: rows of `samples.SAMPLE`.
        comparisons, people: rows of `samples.COMPARISON`, an LLM's answers and people's votes.
        context: what goes into the results as it is: `id`, `name`, `date`, `sets`, `policies` (by name, in
            the order of the figures; each with `kind` and `identity`, and with `round` and `times` where they
            are given), `video_models`, `versions`, `config`, `hashes`. And `training_rewards`, the names of
            the training's rewards (`reward` and those of more_rewards), `training_judge`, the name of its
            judge's model, `warnings`, and `higher_is_better` of measures with another direction.

    Raises:
        FiguresError: see `blocks.blocks`.
    """
    context = dict(context)
    directions = context.pop("higher_is_better", {})
    training = (set(context.pop("training_rewards", ["reward"])), context.pop("training_judge", None))
    warned = list(context.pop("warnings", []))
    found = blocks(_rows(samples), list(context["policies"]), directions)
    answers = [_by_block(found, _rows(rows)) for rows in (comparisons, people)]
    compared: list[dict[str, Any]] = []
    ranking: list[dict[str, Any]] = []
    for number, block in enumerate(found):
        of_block = list(_comparisons(block, settings, directions))
        for rows, by_people in zip(answers, (False, True), strict=True):
            pairs, order = preferences(block, rows[number], by_people, settings)
            of_block += pairs
            ranking += order
        adjusted = holm([entry["p"] for entry in of_block])
        compared += [entry | {"p_holm": p} for entry, p in zip(of_block, adjusted, strict=True)]
    results: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    errors: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for block in found:
        for policy, name in enumerate(block.policies):
            results[block.set][block.video_model][name] = _figures(block, policy, settings, directions)
            errors[block.set][block.video_model][name] = dict(block.errors[name])
    metrics = sorted(
        {metric for block in found for metric in (*block.shares, *block.values)}
        | {entry["metric"] for entry in compared}
    )
    trained_on = [name for name in metrics if _is_trained_on(name, settings, training)]
    outside = [name for name in metrics if name not in trained_on and name not in _DESCRIPTIONS]
    warnings = [] if outside else [NOTHING_OUTSIDE]
    tidied: dict[str, Any] = _tidy(
        {
            **context,
            "order": list(context["policies"]),
            "confidence": settings.confidence,
            "results": results,
            "errors": errors,
            "comparisons": compared,
            "ranking": ranking,
            "higher_is_better": {name: direction(name, directions) for name in metrics},
            "trained_on": trained_on,
            "signs": list(_signs(found, settings, directions, context["policies"])),
            "warnings": [*warnings, *warned, *(line for block in found for line in block.missing())],
        }
    )
    return tidied


def _rows(given: Sequence[Row] | pa.Table) -> list[Row]:
    return given.to_pylist() if isinstance(given, pa.Table) else list(given)


def _by_block(found: Sequence[Block], rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each block; those about prompts go to a set's first one, whatever their video model.

    Raises FiguresError for rows of no block.
    """
    first = {block.set: number for number, block in reversed(list(enumerate(found)))}
    places = {(block.set, block.video_model): number for number, block in enumerate(found)}
    groups: list[list[Row]] = [[] for _ in found]
    for row in rows:
        number = (
            first.get(row["set"]) if row["what"] == "prompt" else places.get((row["set"], row["video_model"]))
        )
        if number is None:
            raise FiguresError(
                f"an answer about set {row['set']!r} and video model {row['video_model']!r}, of which there "
                "are no samples"
            )
        groups[number].append(row)
    return groups


def _figures(
    block: Block, policy: int, settings: Evaluation, directions: Mapping[str, bool | None]
) -> dict[str, dict[str, Any]]:
    """Every metric of one policy."""
    figures = {}
    for name in (*block.shares, *block.values):
        values = block.metric(name, policy)
        entry = _entry(_interval(values, settings, name in block.shares))
        if name in block.values and direction(name, directions) is not None:
            entry |= {"filled": int((~np.isnan(values) & np.isnan(block.seen[name][policy])).sum())}
            entry |= _where_all_have_one(block.seen[name], policy)
        if len(block.seeds) > 1:
            parts = variance_parts(values)
            entry |= {"variance_of_queries": parts.queries, "variance_of_seeds": parts.seeds}
        figures[name] = entry
    return figures


def _interval(values: Floats, settings: Evaluation, share: bool) -> Interval:
    """Of a mean over queries; Wilson's of a share where no query is partly one thing and partly another."""
    if share and np.isin(means := per_query(values), (0, 1)).all():
        return share_interval(int(means.sum()), len(means), settings.confidence)
    return mean_interval(values, settings.confidence, settings.resamples)


def _where_all_have_one(seen: np.ndarray, policy: int) -> dict[str, Any]:
    """The mean over the queries of which every policy has a value for each seed: for comparison with results
    that leave out what is missing."""
    shared = ~np.isnan(seen).any(axis=(0, 2))
    value = float(seen[policy][shared].mean()) if shared.any() else None
    return {"value_where_all_have_one": value, "n_where_all_have_one": int(shared.sum())}


def _entry(found: Interval) -> dict[str, Any]:
    return {
        "value": found.value,
        "stderr": found.stderr,
        "ci_low": found.low,
        "ci_high": found.high,
        "n": found.n,
        **({"note": found.note} if found.note else {}),
    }


def _pairs(policies: Sequence[str]) -> list[tuple[int, int]]:
    numbers = range(len(policies))
    return list(combinations(numbers, 2)) if len(policies) <= ALL_PAIRS else [(0, n) for n in numbers[1:]]


def _comparisons(
    block: Block, settings: Evaluation, directions: Mapping[str, bool | None]
) -> Iterator[dict[str, Any]]:
    for pair in _pairs(block.policies):
        for metric in (*block.shares, *sorted(block.values)):
            found = _difference(block, metric, pair, settings, directions)
            entry = comparison(block, metric, pair, found)
            if direction(metric, directions) is None:
                # More words are neither won nor lost.
                entry |= {"win": None, "tie": None, "loss": None, "p": None}
            yield entry


def _difference(
    block: Block,
    metric: str,
    pair: tuple[int, int],
    settings: Evaluation,
    directions: Mapping[str, bool | None],
) -> Difference:
    similar = 0.0 if is_share(metric) or is_of_prompt(metric) else settings.similar
    return difference(
        block.metric(metric, pair[0]),
        block.metric(metric, pair[1]),
        settings.confidence,
        settings.resamples,
        similar=similar,
        higher_is_better=direction(metric, directions) is not False,
    )


def _is_trained_on(metric: str, settings: Evaluation, training: tuple[set[str], str | None]) -> bool:
    """Whether a metric is by the reward or the judge that the policies were trained to please."""
    rewards, judge = training
    if metric.startswith("verdict."):
        return settings.judge is None
    asked = settings.guard if metric == "prompt.guard_unsafe" else None
    preference = {
        "preference.prompt": settings.prefer_prompts,
        "preference.video": settings.prefer_videos,
    }.get(metric)
    if preference is not None:
        asked = preference.llm
    return (asked is not None and asked.model == judge) or metric.split(".")[0] in rewards


def _signs(
    found: Sequence[Block],
    settings: Evaluation,
    directions: Mapping[str, bool | None],
    policies: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Signs of reward hacking between the policies that training made one of the other."""
    trained = sorted(
        (_TRAINING_ORDER[entry["kind"]], entry.get("round") or 1, number)
        for number, entry in enumerate(policies.values())
        if entry["kind"] in _TRAINING_ORDER and (entry.get("times") or 1) == 1
    )
    numbers = [number for *_, number in trained]
    sets, models = {block.set for block in found}, {block.video_model for block in found}
    told: set[str] = set()
    for block in found:
        known = [_trained(block, number, prompts=block.set not in told) for number in numbers]
        told.add(block.set)
        better = {
            (block.policies[a], block.policies[b]): _better(block, (a, b), settings, directions)
            for a, b in pairwise(numbers)
        }
        where = [block.set] * (len(sets) > 1) + [block.video_model] * (len(models) > 1)
        for sentence in signs(known, better):
            yield f"{', '.join(where)}: {sentence}" if where else sentence


def _trained(block: Block, policy: int, prompts: bool) -> Trained:
    texts = [of_query[0]["prompt"] for of_query in block.rows[policy]] if prompts else []
    names = sorted(
        (name for name in block.seen if "." not in name), key=lambda name: (name != "reward", name)
    )
    scores = {name: block.seen[name][policy].ravel() for name in names}
    return Trained(block.policies[policy], [text for text in texts if text], scores)


def _better(
    block: Block, pair: tuple[int, int], settings: Evaluation, directions: Mapping[str, bool | None]
) -> dict[str, int]:
    """By reward and dimension: whether the later policy is better (1) or worse (-1), apart from 0."""
    found = {}
    for name in sorted(block.values):
        if not is_of_prompt(name):
            gap = _difference(block, name, pair, settings, directions)
            if gap.low is not None and gap.high is not None:
                sign = int(gap.low > 0) - int(gap.high < 0)
                found[name] = sign if direction(name, directions) else -sign
    return found


def _tidy(value: Any) -> Any:
    """Plain mappings and lists, and floats of so many digits that they are the same on every machine."""
    if isinstance(value, Mapping):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
