"""The page of an evaluation: `report.html` beside its `results.json`.

The grid of policies and video models, what differs and whether so many queries can show it, the dimensions,
and the queries themselves, the worst losses first. One static file; its videos are links or copies beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from vpo_ray.evaluation.blocks import is_of_prompt, is_share
from vpo_ray.evaluation.figures import NOTHING_OUTSIDE
from vpo_ray.evaluation.people import votes_table
from vpo_ray.files.folder import Folder
from vpo_ray.records import Row
from vpo_ray.report.chart import Dots, dots
from vpo_ray.report.evaluation_cards import groups_of, query_cards, sorting_metric
from vpo_ray.report.examples import PICTURE, examples_picture, pick_examples
from vpo_ray.report.page import render_page

PAGE = "report.html"
DASH = "–"
_FIRST = (
    "verdict.aligned",
    "verdict.unsafe",
    "verdict.imprecise",
    "verdict.refusal",
    "verdict.none",
    "errors",
)
Figure = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure of the grid. `against`: better or worse than the first policy, where that is shown."""

    metric: str
    value: str
    interval: str
    notes: list[str]
    against: str


@dataclass(frozen=True)
class Grid:
    """Measures of one kind on one set: rows of video model, policy and cells."""

    set: str
    title: str
    metrics: list[str]
    rows: list[tuple[str, str, list[Cell]]]


@dataclass(frozen=True)
class Compared:
    """A comparison. `bar`: where wins and ties end, of 100; `shown`: better | worse | ""."""

    metric: str
    difference: str
    interval: str
    n: int
    counts: tuple[int, int, int] | None
    bar: tuple[float, float]
    p: str
    detectable: str
    notes: list[str]
    shown: str


def write_evaluation_page(
    results: Mapping[str, Any],
    samples: Iterable[Row] | pa.Table,
    comparisons: Iterable[Row] | pa.Table,
    folder: Folder,
) -> str:
    """Write the page into the evaluation's folder, and return its path.

    Args:
        results: the content of results.json, see `evaluation.figures`.
        samples: rows of `evaluation.samples.SAMPLE`.
        comparisons: rows of COMPARISON, an LLM's answers.
        folder: of the evaluation, <run>/evaluation/<id>, with people's votes where there are any.

    Raises:
        StorageError: the page cannot be written, or a video not be copied.
    """
    alpha = 1 - results.get("confidence", 0.95)
    samples = list(_rows(samples))
    groups = groups_of(results)
    answers = {row["comparison_id"]: row for row in (*_rows(comparisons), *votes_table(folder).rows())}
    cards = query_cards(results, samples, answers.values(), folder)
    examples = pick_examples(results, samples)
    picture = examples_picture(examples, folder)
    if picture is not None:
        folder.write(PICTURE, picture)
    page = render_page(
        "evaluation.html",
        ["report.css", "evaluation.css"],
        ["report.js", "evaluation.js"],
        results=results,
        honest=[line for line in results["warnings"] if line == NOTHING_OUTSIDE],
        warnings=[line for line in results["warnings"] if line != NOTHING_OUTSIDE],
        trained_on=set(results["trained_on"]),
        level=f"{100 * (1 - alpha):.3g}",
        grids=list(_grids(results, alpha)),
        groups=groups,
        sorted_by=sorted({sorting_metric(results, group) for group in groups}),
        compared=_compared(results["comparisons"], alpha),
        dimensions=_dimensions(results),
        rankings=_rankings(results.get("ranking", ())),
        errors=list(_errors(results.get("errors", {}))),
        cards=cards,
        examples=examples,
        picture=PICTURE if picture is not None else None,
        details={
            name: yaml.safe_dump(results[name], sort_keys=False, allow_unicode=True)
            for name in ("policies", "video_models", "config", "versions", "hashes")
            if results.get(name)
        },
    )
    folder.write(PAGE, page)
    return folder.at(PAGE)


def _rows(given: Iterable[Row] | pa.Table) -> Iterable[Row]:
    return given.to_pylist() if isinstance(given, pa.Table) else given


def kind_of(metric: str) -> str:
    """Where the page shows a metric."""
    if is_share(metric):
        return "Verdicts and failures"
    if is_of_prompt(metric):
        return "Prompts"
    return "Dimensions" if "." in metric and not metric.startswith(("people.", "preference.")) else "Scores"


def _grids(results: Mapping[str, Any], alpha: float) -> Iterator[Grid]:
    """One table for each set and kind of measures. Dimensions have charts of their own."""
    against = {
        (entry["set"], entry["video_model"], entry["metric"], entry["b"]): (entry["a"], _shown(entry, alpha))
        for entry in reversed(results["comparisons"])
    }
    for of, by_model in results["results"].items():
        listed = [figures for policies in by_model.values() for figures in policies.values()]
        metrics = sorted(
            dict.fromkeys(metric for figures in listed for metric in figures),
            key=lambda metric: _FIRST.index(metric) if metric in _FIRST else len(_FIRST),
        )
        for kind in ("Verdicts and failures", "Scores", "Prompts"):
            names = [metric for metric in metrics if kind_of(metric) == kind]
            rows = []
            for model, policies in by_model.items():
                first = next(iter(policies))
                for policy, figures in policies.items():
                    base, shown = "", ""
                    cells = []
                    for metric in names:
                        base, shown = against.get((of, model, metric, policy), ("", ""))
                        cells.append(_cell(metric, figures.get(metric), shown if base == first else ""))
                    rows.append((model, policy, cells))
            if names:
                yield Grid(of, kind, names, rows)


def _cell(metric: str, figure: Figure | None, against: str) -> Cell:
    if figure is None:
        return Cell(metric, "", "", [], "")
    notes = [figure["note"]] if figure.get("note") else []
    if figure.get("filled"):
        notes.append(f"{figure['filled']} as the worst")
    return Cell(metric, *_figure(figure.get("value"), figure, is_share(metric)), notes, against)


def _decimals(low: float | None, high: float | None) -> int | None:
    """So many that half an interval has two digits."""
    if low is None or high is None or not 0 < high - low < math.inf:
        return None
    return min(6, max(0, 1 - math.floor(math.log10((high - low) / 2))))


def _text(value: float | None, share: bool, decimals: int | None, sign: str = "") -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if share:
        text = f"{round(100 * value, 1) + 0.0:{sign}.1f}\u202f%"
    elif decimals is None:
        text = f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.3g}"
    else:
        text = f"{round(value, decimals) + 0.0:{sign},.{decimals}f}"
    return text.replace(",", "\u202f").replace("-", "\u2212")


def _figure(value: float | None, entry: Figure, share: bool, sign: str = "") -> tuple[str, str]:
    """A value and its interval."""
    low, high = entry.get("ci_low"), entry.get("ci_high")
    decimals = _decimals(low, high)
    text = _text(value, share, decimals, sign)
    if low is None or high is None:
        return text, ""
    ends = f"{_text(low, share, decimals, sign)} to {_text(high, share, decimals, sign)}"
    return text, ends.replace("\u202f%", "", 1)


def _shown(entry: Figure, alpha: float) -> str:
    """better or worse where the adjusted p says that b differs from a."""
    p, win, loss = entry.get("p_holm"), entry.get("win"), entry.get("loss")
    if p is None or p >= alpha or win is None or loss is None or win == loss:
        return ""
    return "better" if win > loss else "worse"


def _compared(entries: Sequence[Figure], alpha: float) -> dict[tuple[str, ...], dict[str, list[Compared]]]:
    """By set, video model, a and b, then by kind: comparisons in the order of the results."""
    found: dict[tuple[str, ...], dict[str, list[Compared]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        group = tuple(entry[name] for name in ("set", "video_model", "a", "b"))
        found[group][kind_of(entry["metric"])].append(_comparison(entry, alpha))
    return found


def _comparison(entry: Figure, alpha: float) -> Compared:
    share = is_share(entry["metric"])
    counts = tuple(entry.get(name) for name in ("win", "tie", "loss"))
    total = sum(count or 0 for count in counts)
    notes = [entry["note"]] if entry.get("note") else []
    if entry.get("flip_rate") is not None:
        notes.append(f"{entry['flip_rate']:.0%} of answers flip with the order")
    if entry.get("unanswered"):
        notes.append(f"{entry['unanswered']} without an answer")
    if entry.get("raters"):
        agreement = (entry.get("agreement") or {}).get("alpha")
        said = "" if agreement is None else f", Krippendorff's alpha {agreement:.2f}"
        notes.append(f"{entry['votes']} votes of {entry['raters']}{said}")
    difference, interval = _figure(entry.get("difference"), entry, share, "+")
    decimals = _decimals(entry.get("ci_low"), entry.get("ci_high"))
    return Compared(
        metric=entry["metric"],
        difference=difference,
        interval=interval,
        n=entry.get("n") or 0,
        counts=None if None in counts else counts,  # type: ignore[arg-type]
        bar=_bar(counts[0] or 0, counts[1] or 0, total),
        p=_p(entry.get("p_holm")),
        detectable=_text(entry.get("smallest_detectable"), share, decimals),
        notes=notes,
        shown=_shown(entry, alpha),
    )


def _bar(win: int, tie: int, total: int) -> tuple[float, float]:
    return (100 * win / total, 100 * (win + tie) / total) if total else (0.0, 100.0)


def _p(value: float | None) -> str:
    return DASH if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"


def _dimensions(results: Mapping[str, Any]) -> dict[tuple[str, str], list[tuple[str, Dots]]]:
    """By set and video model: a chart for each dimension, with the policies as rows."""
    found: dict[tuple[str, str], list[tuple[str, Dots]]] = {}
    for of, by_model in results["results"].items():
        for model, policies in by_model.items():
            metrics = sorted({metric for figures in policies.values() for metric in figures})
            charts = [
                (metric, dots(metric, [(name, *_ends(policies[name].get(metric))) for name in policies]))
                for metric in metrics
                if kind_of(metric) == "Dimensions"
            ]
            found[of, model] = [(metric, chart) for metric, chart in charts if chart is not None]
    return {where: charts for where, charts in found.items() if charts}


def _ends(figure: Figure | None) -> tuple[float | None, float | None, float | None]:
    figure = figure or {}
    return figure.get("value"), figure.get("ci_low"), figure.get("ci_high")


def _rankings(entries: Sequence[Figure]) -> list[tuple[str, str, str, Dots]]:
    """Set, video model, metric and chart of the policies' strengths."""
    charts = [
        (
            entry,
            dots(
                entry["metric"],
                [
                    (item["policy"], item.get("strength"), item.get("ci_low"), item.get("ci_high"))
                    for item in entry["policies"]
                    if item.get("strength") is not None
                ],
            ),
        )
        for entry in entries
    ]
    return [(e["set"], e["video_model"], e["metric"], chart) for e, chart in charts if chart is not None]


def _errors(errors: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, int]]:
    """Set, video model, policy, reason and number of samples that failed."""
    for of, by_model in errors.items():
        for model, policies in by_model.items():
            for policy, reasons in policies.items():
                for reason, count in reasons.items():
                    yield of, model, policy, reason, count
