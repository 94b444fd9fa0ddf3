"""The samples of a set and video model as arrays: policies × queries × seeds, for each measure.

Every policy has answered the same queries with the same seeds, or there is nothing to compare. A missing
value counts as the worst one seen, so that a policy does not look better for what it failed to make.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vpo_ray.evaluation.statistics import Floats
from vpo_ray.records import VERDICTS, Row
from vpo_ray.stages.tally import by_reason, reason_of

# What is neither better high nor low; those that are better low. All others are better high.
NEITHER = frozenset({"prompt.words", "prompt.characters"})
_LOWER = frozenset({
    "errors", "verdict.unsafe", "verdict.imprecise", "verdict.refusal", "verdict.none",
    "prompt.unsafe_words", "prompt.guard_unsafe",
})  # fmt: skip


class FiguresError(ValueError):
    """Samples that no figures can be computed from; the message says which."""


def direction(metric: str, given: Mapping[str, bool | None]) -> bool | None:
    """Whether a metric is better high (True), low (False), or neither (None), unless `given` says so."""
    return given.get(metric, None if metric in NEITHER else metric not in _LOWER)


def is_of_prompt(metric: str) -> bool:
    return metric.startswith("prompt.")


def is_share(metric: str) -> bool:
    return metric == "errors" or metric.startswith("verdict.")


@dataclass(frozen=True)
class Block:
    """One set with one video model.

    Args:
        rows: [policies][queries][seeds].
        seen: by measure, the values [policies, queries, seeds] of the samples; nan where there is none.
        values: the same with the worst value seen in place of a missing one; nan where a measure does not
            apply to a query, or is neither better high nor low.
        shares: 0 or 1 by metric, [policies, queries, seeds]: the verdicts, and whether the sample failed.
        errors: by policy, how many samples failed, by reason.
        reasons: by policy, query and seed, why a sample has no video or no score.
    """

    set: str
    video_model: str
    policies: Sequence[str]
    queries: Sequence[str]
    seeds: Sequence[int]
    rows: Sequence[Sequence[Sequence[Row]]]
    seen: Mapping[str, Floats]
    values: Mapping[str, Floats]
    shares: Mapping[str, Floats]
    errors: Mapping[str, Mapping[str, int]]
    reasons: Mapping[tuple[int, ...], str]

    def metric(self, name: str, policy: int) -> Floats:
        """[queries, seeds] of a policy."""
        return (self.shares if name in self.shares else self.values)[name][policy]

    def missing(self) -> list[str]:
        """One sentence for each policy and kind of failure that values were filled in for."""
        found = []
        for number, policy in enumerate(self.policies):
            groups: dict[bytes, dict[str, None]] = {}
            for name, values in self.values.items():
                filled = ~np.isnan(values[number]) & np.isnan(self.seen[name][number])
                if filled.any():
                    whole = name if is_of_prompt(name) else name.split(".")[0]
                    groups.setdefault(filled.tobytes(), {})[whole] = None
            for mask, names in groups.items():
                where = np.frombuffer(mask, bool).reshape(len(self.queries), len(self.seeds))
                places = ((number, *place) for place in np.argwhere(where).tolist())
                why = Counter(self.reasons.get(place, "without a reason") for place in places)
                reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason(why).items())
                found.append(
                    f"{self.set}, {self.video_model}: {policy} has no {' and no '.join(sorted(names))} of "
                    f"{where.sum()} of {where.size} samples, which count as the worst value seen: {reasons}"
                )
        return found


def blocks(samples: Sequence[Row], policies: Sequence[str], better: Mapping[str, bool | None]) -> list[Block]:
    """The samples by set and video model, `render` first.

    Args:
        policies: in the order of the figures.
        better: see `direction`.

    Raises:
        FiguresError: no samples, two of one place, or policies that answered different queries.
    """
    if not samples:
        raise FiguresError(
            "there are no samples to compute figures from: every set of the evaluation is empty"
        )
    groups: dict[tuple[str, str], dict[str, dict[tuple[str, int], Row]]] = {}
    for row in samples:
        group = groups.setdefault((row["set"], row["video_model"]), {name: {} for name in policies})
        place = (row["query_id"], row["seed"])
        if row["policy"] not in group:
            raise FiguresError(f"samples of {row['policy']!r}, which is no policy of this evaluation")
        if place in group[row["policy"]]:
            raise FiguresError(
                f"set {row['set']}, {row['video_model']}: {row['policy']} has two samples of the query "
                f"{row['query']!r} with seed {row['seed']}"
            )
        group[row["policy"]][place] = row
    order = sorted(groups, key=lambda key: (key[0], key[1] != "render", key[1]))
    return [_block(*key, groups[key], better) for key in order]


def _block(
    set: str,
    video_model: str,
    found: Mapping[str, Mapping[tuple[str, int], Row]],
    better: Mapping[str, bool | None],
) -> Block:
    _refuse_other_queries(set, video_model, found)
    places = next(iter(found.values()))
    queries, seeds = sorted({query for query, _ in places}), sorted({seed for _, seed in places})
    if len(places) < len(queries) * len(seeds):
        raise FiguresError(f"set {set}, {video_model}: some queries have fewer seeds than others")
    rows = [[[of[query, seed] for seed in seeds] for query in queries] for of in found.values()]
    shape = (len(rows), len(queries), len(seeds))
    seen: dict[str, Floats] = {}
    failed = np.zeros(shape, bool)
    made = {"prompt": np.zeros(shape, bool), "video": np.zeros(shape, bool)}
    errors: dict[str, Counter[str]] = {name: Counter() for name in found}
    reasons: dict[tuple[int, ...], str] = {}
    for at in np.ndindex(shape):
        row = rows[at[0]][at[1]][at[2]]
        why = row["error"] and f"{row['error_stage'] or 'unknown stage'}: {reason_of(row['error'])}"
        for measure in row["measures"] or ():
            name, value = measure["name"], measure["value"]
            if value is not None and math.isfinite(value):
                seen.setdefault(name, np.full(shape, np.nan))[at] = value
            elif value is not None:
                why = why or f"{name} is {value}"
        made["prompt"][at] = row["prompt"] is not None
        made["video"][at] = row["video_key"] is not None and not why
        if why:
            failed[at] = True
            errors[list(found)[at[0]]][why] += 1
        if why or row["skipped"]:
            reasons[at] = why or row["skipped"]
    verdicts = np.array(
        [[[row["verdict"] or "none" for row in seeds] for seeds in of_policy] for of_policy in rows]
    )
    return Block(
        set,
        video_model,
        list(found),
        queries,
        seeds,
        rows,
        seen,
        {
            name: _filled(values, direction(name, better), made["prompt" if is_of_prompt(name) else "video"])
            for name, values in seen.items()
        },
        {
            **{f"verdict.{name}": (verdicts == name).astype(float) for name in (*VERDICTS, "none")},
            "errors": failed.astype(float),
        },
        {name: by_reason(counts) for name, counts in errors.items()},
        reasons,
    )


def _refuse_other_queries(
    set: str, video_model: str, found: Mapping[str, Mapping[tuple[str, int], Row]]
) -> None:
    every = {place: row["query"] for of in found.values() for place, row in of.items()}
    for policy, of in found.items():
        if lacking := sorted(every.keys() - of.keys()):
            texts = list(dict.fromkeys(every[place] for place in lacking))
            shown = ", ".join(repr(text) for text in texts[:5]) + (", …" if len(texts) > 5 else "")
            raise FiguresError(
                f"set {set}, {video_model}: the policies answered different queries. {policy} has no sample "
                f"of {len(lacking)} that another has: {shown}"
            )


def _filled(values: Floats, better: bool | None, made: np.ndarray) -> Floats:
    """Values with the worst one seen in place of a missing one.

    A measure is of some queries only (required words, VBench's dimensions) where there is one without any
    value although what is measured was made. All queries without any are then left out; otherwise they count.
    """
    if better is None:
        return values
    worst = np.nanmin(values) if better else np.nanmax(values)
    without = np.asarray(np.isnan(values).all(axis=(0, 2)))
    of_some = bool((without & made.any(axis=(0, 2))).any())
    applies = ~without if of_some else np.ones_like(without)
    return np.where(np.isnan(values) & applies[:, None], worst, values)
