"""An evaluation's results as plain text for the terminal: policies as rows, differences, then warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.cells import cell_len

from vpo_ray.evaluation.figures import NOTHING_OUTSIDE
from vpo_ray.records import VERDICTS

Results = Mapping[str, Any]
GAP = "  "
_REASONS = 3  # of a policy's failures that are shown


def table_text(results: Results, width: int = 100) -> str:
    """The results in lines of at most `width` cells, unless one column and the policies' names take more.

    Where no measure is from outside the training, the first line says so. Dimensions of scores are left to
    results.json and the report.
    """
    lines: list[str] = []
    first, *others = results["warnings"] or [None]
    if first == NOTHING_OUTSIDE:
        lines += [*_wrapped(f"Note: {first}.", width), ""]
    else:
        others = results["warnings"]
    for name, models in sorted(results["results"].items()):
        for model in sorted(models, key=lambda model: (model != "render", model)):
            lines += [*_block(results, name, model, width), ""]
    if results["trained_on"]:
        lines += _wrapped(
            "* the training's own reward or judge: what the policies were trained to please", width
        )
    for sentence in results["signs"]:
        lines += _wrapped(f"sign: {sentence}", width)
    for sentence in others:
        lines += _wrapped(f"warning: {sentence}", width)
    return "\n".join(lines).rstrip() + "\n"


def log_text(results: Results) -> str:
    """The results for a log, where nobody scrolls: means without intervals, the differences from the first
    policy that were found, failures, and warnings, each in one line."""
    lines: list[str] = []
    for name, models in sorted(results["results"].items()):
        for model in sorted(models, key=lambda model: (model != "render", model)):
            policies = models[model]
            rows, metrics, queries, _ = _measured(results, policies)
            columns = [["", *rows]] + [
                [
                    _label(results, metric),
                    *(_number(metric, value, "%") if value is not None else "-" for value in values),
                ]
                for metric in metrics
                for values in [[policies[row].get(metric, {}).get("value") for row in rows]]
            ]
            lines += [f"{name}, {_model(results, model)}: {queries} queries", *_columns(columns, math.inf)]
            lines += _failures(results, name, model, rows)
            lines += _found(results, name, model, rows)
    lines += [f"warning: {sentence}" for sentence in results["warnings"] if sentence != NOTHING_OUTSIDE]
    return "".join(f"{_printable(line).rstrip()}\n" for line in lines)


def _found(results: Results, name: str, model: str, rows: Sequence[str]) -> Iterator[str]:
    """A line for each policy that differs from the first one, or from the one before it."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in sorted(results["comparisons"], key=lambda entry: _rank(entry["metric"])):
        metric, p, shift = entry["metric"], entry["p_holm"], entry["difference"]
        here = (entry["set"], entry["video_model"]) == (name, model) and not _is_dimension(metric)
        if here and shift is not None and p is not None and p < 1 - results["confidence"]:
            word = "better" if entry["win"] > entry["loss"] else "worse"
            said = f"{_label(results, metric)} {_with_interval(metric, shift, entry, sign=True)}"
            found.setdefault((entry["a"], entry["b"]), {}).setdefault(word, []).append(said)
    for before, row in pairwise(rows):
        for other in dict.fromkeys((rows[0], before)):
            if kinds := found.get((other, row)):
                told = [f"{word} {', '.join(kinds[word])}" for word in sorted(kinds)]
                yield f"{row} against {other}: {'; '.join(told)}"


def _measured(results: Results, policies: Mapping[str, Any]) -> tuple[list[str], list[str], int, list[str]]:
    """Policies in order, measures to show, how many queries, and what happens under no policy."""
    rows = [policy for policy in results["order"] if policy in policies]
    queries = max(entry["n"] for metrics in policies.values() for entry in metrics.values())
    metrics = sorted(
        {metric for of in policies.values() for metric in of if not _is_dimension(metric)}, key=_rank
    )
    absent = [metric for metric in metrics if _never_happens(metric, policies.values(), queries)]
    return rows, [metric for metric in metrics if metric not in absent], queries, absent


def _model(results: Results, model: str) -> str:
    shown = str(results["video_models"].get(model, model))
    return model if shown == model else f"{model} ({shown})"


def _block(results: Results, name: str, model: str, width: int) -> Iterator[str]:
    policies = results["results"][name][model]
    rows, metrics, queries, absent = _measured(results, policies)
    yield from _wrapped(f"{name}, {_model(results, model)}: {queries} queries", width)
    yield ""
    columns = [["", *rows]] + [
        [
            _label(results, metric),
            *(_figure(metric, policies[policy].get(metric), queries) for policy in rows),
        ]
        for metric in metrics
    ]
    if metrics:
        yield from _columns(columns, width)
    if absent:
        named = ", ".join(_label(results, metric) for metric in absent)
        yield from _wrapped(f"zero for every policy: {named}", width)
    failures = [line for text in _failures(results, name, model, rows) for line in _wrapped(text, width)]
    yield from ["", *failures] if failures else []
    compared = [
        entry
        for entry in results["comparisons"]
        if (entry["set"], entry["video_model"]) == (name, model)
        and not _is_dimension(entry["metric"])
        and entry["win"] is not None
    ]
    for first in rows:
        # What a judge prefers is not seen in the policies' own figures.
        shown = [
            entry
            for entry in compared
            if entry["a"] == first and (first == rows[0] or _is_preference(entry["metric"]))
        ]
        if shown:
            equal = [entry for entry in shown if _all_tie(entry)]
            differing, remarks = _differences(
                results, first, rows, [entry for entry in shown if entry not in equal]
            )
            yield ""
            yield from _columns(differing, width)
            for name in rows:
                alike = {entry["metric"] for entry in equal if entry["b"] == name}
                if alike := alike - set(absent):
                    named = ", ".join(_label(results, metric) for metric in sorted(alike, key=_rank))
                    yield from _wrapped(f"{name} against {first}, no query differs in {named}", width)
            for remark in remarks:
                yield from _wrapped(remark, width)
    for ranking in results["ranking"]:
        if (ranking["set"], ranking["video_model"]) == (name, model):
            order = ", ".join(f"{each['policy']} {each['strength']:+.2f}" for each in ranking["policies"])
            yield ""
            yield from _wrapped(
                f"order by {_label(results, ranking['metric'])} (log strength): {order}", width
            )


def _failures(results: Results, name: str, model: str, rows: Sequence[str]) -> Iterator[str]:
    for policy in rows:
        if reasons := results["errors"][name][model][policy]:
            ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            shown = [f"{count} {reason}" for reason, count in ordered[:_REASONS]]
            more = [f"{len(reasons) - _REASONS} other reasons"] if len(reasons) > _REASONS else []
            yield f"{policy} failed: {', '.join([*shown, *more])}"


def _differences(
    results: Results, first: str, rows: Sequence[str], compared: Sequence[Mapping[str, Any]]
) -> tuple[list[list[str]], list[str]]:
    """The columns of what differs from the first policy, and remarks."""
    names = max(map(cell_len, rows))
    table = [(f"against {first}", "difference", "win/tie/loss", "p (Holm)", "detectable", "")]
    remarks, before = [], None
    for entry in sorted(compared, key=lambda entry: (rows.index(entry["b"]), _rank(entry["metric"]))):
        name, metric, p = entry["b"], entry["metric"], entry["p_holm"]
        shift, detectable = entry["difference"], entry["smallest_detectable"]
        found = p is not None and p < 1 - results["confidence"]
        table.append(
            (
                f"{'' if name == before else name:{names}}  {_label(results, metric)}",
                "-" if shift is None else _with_interval(metric, shift, entry, sign=True),
                f"{entry['win']}/{entry['tie']}/{entry['loss']}",
                "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
                "-" if detectable is None else _number(metric, detectable, "pt"),
                "" if not found else "better" if entry["win"] > entry["loss"] else "worse",
            )
        )
        if remark := ", ".join(_remarks(entry)):
            remarks.append(f"{name} against {first}, {_label(results, metric)}: {remark}")
        before = name
    return [list(column) for column in zip(*table, strict=True)], remarks


def _all_tie(entry: Mapping[str, Any]) -> bool:
    """Whether nothing but equal values was seen, of more than one query; a preference has more to say."""
    return entry["win"] + entry["loss"] == 0 and entry["tie"] > 1 and not _is_preference(entry["metric"])


def _remarks(entry: Mapping[str, Any]) -> Iterator[str]:
    if entry["note"]:
        yield entry["note"]
    if entry.get("flip_rate") is not None:
        yield f"{entry['flip_rate']:.0%} of the answers change with the order"
    if entry.get("unanswered"):
        yield f"{entry['unanswered']} have no answer"
    if entry.get("raters"):
        share = entry["agreement"]["share"]
        yield f"{entry['votes']} votes of {entry['raters']} raters"
        if share is not None:
            yield f"{share:.0%} of two votes on one pair agree"


def _columns(columns: Sequence[Sequence[str]], width: float) -> Iterator[str]:
    """Columns side by side, in as many parts as the width takes, each with the first column."""
    widths = [max(map(cell_len, column)) for column in columns]
    parts: list[list[int]] = []
    for number in range(1, len(columns)):
        taken = sum(widths[each] + len(GAP) for each in (parts[-1] if parts else ())) + widths[0]
        if not parts or (parts[-1] and taken + len(GAP) + widths[number] > width):
            parts.append([])
        parts[-1].append(number)
    for at, part in enumerate(parts):
        if at:
            yield ""
        for row in range(len(columns[0])):
            cells = [
                columns[number][row] + " " * (widths[number] - cell_len(columns[number][row]))
                for number in (0, *part)
            ]
            yield GAP.join(cells).rstrip()


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of a sentence, which may hold text of users; the later ones are indented."""
    line = ""
    for word in _printable(text).split():
        if line.strip() and cell_len(line) + 1 + cell_len(word) > width:
            yield line
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield line


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _rank(metric: str) -> tuple[int, str]:
    """Errors, verdicts in their order, prompts, scores, preferences."""
    verdicts = [f"verdict.{name}" for name in (*VERDICTS, "none")]
    if metric == "errors":
        return (0, metric)
    if metric in verdicts:
        return (1 + verdicts.index(metric), metric)
    kind = 10 if metric.startswith("prompt.") else 30 if _is_preference(metric) else 20
    return (kind, metric)


def _never_happens(metric: str, policies: Iterable[Mapping[str, Any]], queries: int) -> bool:
    """Whether errors, or a verdict, is that of no query under any policy."""
    entries = [metrics.get(metric) for metrics in policies]
    return (metric == "errors" or metric.startswith("verdict.")) and all(
        entry is not None and entry["value"] == 0 and entry["n"] == queries for entry in entries
    )


def _is_preference(metric: str) -> bool:
    return metric.startswith(("preference.", "people."))


def _is_dimension(metric: str) -> bool:
    return "." in metric and not metric.startswith(("verdict.", "prompt.", "preference.", "people."))


def _label(results: Results, metric: str) -> str:
    mark = "*" if metric in results["trained_on"] else ""
    return f"{metric.removeprefix('verdict.')}{mark}"


def _figure(metric: str, entry: Mapping[str, Any] | None, queries: int) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    shown = _with_interval(metric, entry["value"], entry)
    return shown if entry["n"] == queries else f"{shown} n={entry['n']}"


def _with_interval(metric: str, value: float, entry: Mapping[str, Any], sign: bool = False) -> str:
    """Digits as the interval's width allows: two of its half."""
    low, high = entry["ci_low"], entry["ci_high"]
    plus, unit = "+" if sign and value > 0 else "", "pt" if sign else "%"
    if low is None:
        return plus + _number(metric, value, unit)
    if _is_share(metric):
        return f"{plus}{_number(metric, value, unit)} [{100 * low:.1f}, {100 * high:.1f}]"
    digits = min(6, max(0, 1 - math.floor(math.log10((high - low) / 2)))) if high > low else 3
    return f"{plus}{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(metric: str, value: float, unit: str) -> str:
    """A share in percent, a difference of two in points."""
    return f"{100 * value:.1f}{unit}" if _is_share(metric) else f"{value:.3g}"


def _is_share(metric: str) -> bool:
    return metric == "errors" or metric.startswith(("verdict.", "preference.", "people."))
