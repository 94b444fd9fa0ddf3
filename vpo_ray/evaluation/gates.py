"""Limits that an evaluation must keep, for CI and before a release.

    vpo evaluate recipe.yaml --fail-below alignment.aligned=0.93
    vpo evaluate recipe.yaml --no-worse-than main/results.json --by 0.02

and `serve.require`, without which `vpo deploy` refuses a checkpoint. The figures themselves are compared: how
sure they are is in the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpo_ray.files.text_files import TextFileError, read_text
from vpo_ray.recipe.evaluation import Limit, limit_of
from vpo_ray.recipe.serve import Require
from vpo_ray.records import content_id

Results = Mapping[str, Any]


class GateError(RuntimeError):
    """An evaluation that does not keep its limits; one line for each that it does not keep."""

    exit_status = 4


class LimitError(ValueError):
    """A limit that cannot be checked, or results that it cannot be checked on."""


def must_pass(reasons: Sequence[str]) -> None:
    """Raises GateError where there is a reason."""
    if reasons:
        raise GateError("the evaluation does not pass:\n  " + "\n  ".join(reasons))


def read_results(place: str) -> dict[str, Any]:
    """The results of a file, a path or URI of a results.json. Raises LimitError."""
    try:
        found = json.loads(read_text(place))
    except TextFileError as error:
        raise LimitError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise LimitError(f"{place} is not JSON: {error}") from error
    if not isinstance(found, dict) or not {"results", "policies", "order", "sets"} <= found.keys():
        raise LimitError(f"{place} is not the results.json of an evaluation")
    return found


def below(results: Results, limits: Sequence[str], policy: str | None = None) -> list[str]:
    """Which limits a policy does not keep, and by which figures.

    Args:
        limits: see `recipe.evaluation.limit_of`. A metric is looked at with every video model.
        policy: of limits that name none; the last of the evaluation's when None.

    Raises:
        LimitError: a limit that is not of this form, or of what was not measured.
    """
    return [reason for limit in limits for reason in _below(results, limit, policy or results["order"][-1])]


def parse_limit(text: str) -> Limit:
    """See `recipe.evaluation.limit_of`. Raises LimitError."""
    try:
        return limit_of(text)
    except ValueError as error:
        raise LimitError(str(error)) from None


def _below(results: Results, text: str, policy: str) -> Iterator[str]:
    limit = parse_limit(text)
    policy, metric = limit.policy or policy, limit.metric
    found = {
        place: entry
        for place, entry in _figures(results).items()
        if place[2:] == (policy, metric) and limit.set in (None, place[0])
    }
    if not found:
        raise LimitError(
            f"{text!r}: {policy} has no {metric} in {limit.set or 'any set'}. There are the policies "
            f"{', '.join(results['order'])}, the sets {', '.join(sorted(results['results']))} and the "
            f"metrics {', '.join(sorted(results['higher_is_better']))}"
        )
    better = results["higher_is_better"].get(metric)
    if better is None:
        raise LimitError(f"{text!r}: {metric} is neither better high nor low")
    for place, entry in found.items():
        value = entry["value"]
        if value is None:
            yield f"{_name(place)} has no value: {entry.get('note')}"
        elif value < limit.value if better else value > limit.value:
            side = "below" if better else "above"
            yield f"{_name(place)} is {_shown(results, entry)}, {side} {limit.value:g}"


def worse(results: Results, earlier: Results, by: float) -> list[str]:
    """What has become worse than in an earlier evaluation of the same sets, by more than `by`.

    Compared are policies of one name, in every set and video model, by all metrics of which one direction is
    better.

    Args:
        by: in the unit of each metric; 0.02 of a share is two points.

    Raises:
        LimitError: a set has other queries now, or there is nothing that both evaluations measured.
    """
    now, before = _figures(results), _figures(earlier)
    for name in sorted(results["sets"].keys() & earlier["sets"].keys()):
        if results["sets"][name]["hash"] != earlier["sets"][name]["hash"]:
            raise LimitError(
                f"the set {name} has other queries than in the evaluation of {earlier.get('date')}: figures "
                "of different queries cannot be compared"
            )
    reasons, compared = [], 0
    for place, old in before.items():
        better, new = results["higher_is_better"].get(place[-1]), now.get(place)
        if better is None or new is None or old["value"] is None:
            continue
        compared += 1
        change = math.nan if new["value"] is None else new["value"] - old["value"]
        # Rounding is no change: 0.93 - 0.91 is more than 0.02.
        if not (change if better else -change) >= -by - 1e-9:
            reasons.append(
                f"{_name(place)} is {_shown(results, new)}, and was {old['value']:.4g} on "
                f"{earlier.get('date')}: worse by more than {by:g}"
            )
    if not compared:
        raise LimitError(
            "the two evaluations have no set, policy and metric in common: compare those of one `evaluate` "
            "section"
        )
    return reasons


def require_evaluation(checkpoint: str, required: Require | None) -> None:
    """Refuse a checkpoint whose evaluation is missing or did not pass: see `serve.require`.

    The checkpoint is one of the evaluation's policies where its `vpo.json` names that policy's identity, or
    where it has the configuration, tokenizer and weights (by samples) of the one that was evaluated.

    Raises:
        GateError: a limit is not kept, or the evaluation is of other checkpoints.
        LimitError: the results cannot be read, or a limit cannot be checked.
        StorageError: the checkpoint cannot be read.
    """
    if required is None:
        return
    from vpo_ray.train.model_files import identity, marker

    results = read_results(required.results)
    # Of a policy of the run, and of one of kind `checkpoint`: see `policies.Rival`.
    files = content_id("checkpoint", identity(checkpoint, None), digits=16)
    known = {(marker(checkpoint) or {}).get("fingerprint"), files} - {None}
    policies = [name for name, policy in results["policies"].items() if policy["identity"] in known]
    if not policies:
        raise GateError(
            f"serve.require: {required.results} evaluates other checkpoints than {checkpoint}: none of its "
            f"policies ({', '.join(results['order'])}) has its identity. Evaluate this one"
        )
    must_pass([reason for name in policies for reason in below(results, required.fail_below, name)])


def _figures(results: Results) -> dict[tuple[str, str, str, str], Mapping[str, Any]]:
    """All figures by set, video model, policy and metric."""
    return {
        (name, model, policy, metric): entry
        for name, models in sorted(results["results"].items())
        for model, policies in sorted(models.items())
        for policy, metrics in sorted(policies.items())
        for metric, entry in sorted(metrics.items())
    }


def _name(place: tuple[str, str, str, str]) -> str:
    *where, policy, metric = place
    return f"{', '.join(where)}: {metric} of {policy}"


def _shown(results: Results, entry: Mapping[str, Any]) -> str:
    if entry["value"] is None or entry["ci_low"] is None:
        return "unknown" if entry["value"] is None else f"{entry['value']:.4g}"
    interval = f"{results['confidence']:.0%} interval {entry['ci_low']:.4g} to {entry['ci_high']:.4g}"
    return f"{entry['value']:.4g} ({interval})"
