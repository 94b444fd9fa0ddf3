"""Line charts as plain geometry: the template turns them into inline SVG. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 280.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 268.0, 14.0, 140.0
MAX_POINTS = 200

# Phase, key in metrics/<phase>.jsonl, title, what a reader should know, fixed bounds if any.
CURVES: tuple[tuple[str, str, str, str, tuple[float, float] | None], ...] = (
    ("sft", "loss", "SFT loss", "per token", None),
    ("sft", "eval_loss", "SFT loss, held out", "per token, of rows not trained on", None),
    ("rl", "loss", "RL loss", "0 at the start: the policy is the one that sampled", None),
    ("rl", "kl", "RL divergence", "from the reference, nats a token", None),
    ("rl", "clipped", "RL clipped", "share of tokens that clipping holds back", (0.0, 1.0)),
    ("dpo", "loss", "DPO loss", "0.69 at the start: no preference", None),
    ("dpo", "eval_loss", "DPO loss, held out", "of pairs not trained on", None),
    ("dpo", "accuracy", "DPO accuracy", "pairs with the chosen prompt ahead", (0.0, 1.0)),
    ("dpo", "margin", "DPO margin", "reward of chosen less rejected", None),
)


@dataclass(frozen=True)
class Chart:
    """A curve in SVG units: `points` for a polyline, ticks as (position, label)."""

    title: str
    note: str
    points: str
    end: tuple[float, float]
    first: str
    last: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left_out: int


def charts(metrics: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """The charts of CURVES for which there are at least two steps."""
    drawn = []
    for phase, key, title, note, bounds in CURVES:
        lines = [line for line in metrics.get(phase, []) if key in line]
        steps, values = [float(line["step"]) for line in lines], [float(line[key]) for line in lines]
        chart = draw(title, note, steps, values, bounds)
        if chart is not None:
            drawn.append(chart)
    return drawn


def draw(
    title: str,
    note: str,
    steps: Sequence[float],
    values: Sequence[float],
    bounds: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of values over steps, None with fewer than two finite ones. Long curves are averaged
    over neighbouring steps to at most MAX_POINTS."""
    finite = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    if len(finite) < 2:
        return None
    size = -(-len(finite) // MAX_POINTS)
    chunks = [finite[i : i + size] for i in range(0, len(finite), size)]
    xs = [sum(x for x, _ in chunk) / len(chunk) for chunk in chunks]
    ys = [sum(y for _, y in chunk) / len(chunk) for chunk in chunks]
    y_ticks = ticks(*(bounds or (min(ys), max(ys))), count=5)
    low, high = y_ticks[0], y_ticks[-1]
    decimals = 2 - math.floor(math.log10(y_ticks[1] - low))
    first, last = finite[0][0], finite[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    inside = [x for x in ticks(first, last, count=4) if first <= x <= last and x == int(x)]
    return Chart(
        title=title,
        note=note,
        points=" ".join(f"{x},{y}" for x, y in points),
        end=points[-1],
        first=f"{round(ys[0], decimals) + 0.0:g}",
        last=f"{round(ys[-1], decimals) + 0.0:g}",
        x_ticks=[(place(x, low)[0], f"{x:g}") for x in inside],
        y_ticks=[(place(first, y)[1], f"{y:.10g}") for y in y_ticks],
        left_out=len(values) - len(finite),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]; around a range
    without width there is some room."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(size, 1e-3):
        pad = size * 0.1 if size > 1e-9 else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(start, end + 1)]


@dataclass(frozen=True)
class Dots:
    """A dot with its interval a row, in SVG units: rows as (y, name, dot, low, high, value)."""

    title: str
    height: float
    rows: list[tuple[float, str, float, float, float, str]]
    x_ticks: list[tuple[float, str]]


DOTS_LEFT, DOTS_RIGHT, ROW = 92.0, 232.0, 24.0


def dots(title: str, figures: Sequence[tuple[str, float | None, float | None, float | None]]) -> Dots | None:
    """A chart of figures as (name, value, low, high), None if no value is finite. A row without a value has
    no dot; without an interval, its ends are the dot."""

    def end(value: float, bound: float | None) -> float:
        return value if bound is None or not math.isfinite(bound) else bound

    known = [
        (n, name, value, end(value, low), end(value, high))
        for n, (name, value, low, high) in enumerate(figures)
        if value is not None and math.isfinite(value)
    ]
    if not known:
        return None
    x_ticks = ticks(min(row[3] for row in known), max(row[4] for row in known), count=2)
    first, last = x_ticks[0], x_ticks[-1]

    def place(x: float) -> float:
        return round(DOTS_LEFT + (x - first) / (last - first) * (DOTS_RIGHT - DOTS_LEFT), 1)

    return Dots(
        title=title,
        height=ROW * len(figures) + 18,
        rows=[
            (ROW * n + ROW / 2, name, place(value), place(low), place(high), f"{value:.3g}")
            for n, name, value, low, high in known
        ],
        x_ticks=[(place(x), f"{x:.10g}") for x in x_ticks],
    )
