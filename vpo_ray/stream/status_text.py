"""A view of `meter` as text: a line for a log, a table for a terminal."""

from __future__ import annotations

from typing import Any

from vpo_ray.records import Row

LONGEST_REASON = 100


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, size in ((99, "s", 1), (99 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def status_line(view: Row) -> str:
    """One line: how far, how fast, what failed, how long still."""
    parts = [_steps(view)] if "steps" in view else [", ".join(_stage(stage) for stage in view["stages"])]
    for stage in view.get("stages", ()):
        if stage["errors"]:
            parts.append(f"{stage['errors']} failed in {stage['name']}: {_short(stage['reason'])}")
    if view.get("slowest"):
        parts.append(f"{view['slowest']} is slowest")
    if view["left_s"]:
        parts.append(f"{duration(view['left_s'])} left")
    if view.get("spent"):
        parts.append(f"{view['spent']:.2f} paid")
    return f"{view['what']}: " + "; ".join(parts)


def _steps(view: Row) -> str:
    if not view["step"]:
        return view["doing"] or "starting"
    said = f"step {view['step']} of {view['steps']}"
    if view["loss"] is not None:
        said += f", loss {view['loss']:.3f}"
    if view["tokens_s"]:
        said += f", {view['tokens_s']:,.0f} tokens/s"
    return f"{view['doing']}, {said}" if view["step"] == view["steps"] and view["doing"] else said


def _stage(stage: Row) -> str:
    said = f"{stage['name']} {stage['done']}"
    said += f"/{stage['total']}" if stage["total"] is not None else ""
    if stage["done"] == stage["total"] or not stage["rows_s"]:
        return said
    more = [f"{stage['rows_s']:.2g}/s"]
    if stage["tokens_s"]:
        more.append(f"{stage['tokens_s']:,.0f} tokens/s")
    if stage["busy"] is not None:
        more.append(f"{stage['busy']:.0%} busy")
    return f"{said} ({', '.join(more)})"


def _short(reason: Any) -> str:
    text = " ".join(str(reason).split())
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def status_table(view: Row) -> Any:
    """The same as a renderable of rich."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    if "steps" in view:
        grid.add_row(view["what"], ProgressBar(view["steps"], view["step"], width=24), _steps(view))
    else:
        for title in ("", "", "done", "rows/s", "busy", "in flight", "tokens/s", "errors", "left"):
            grid.add_column(Text(title, "dim"), justify="left" if not title else "right")
        grid.show_header = True
        for stage in view["stages"]:
            slowest = stage["name"] == view["slowest"]
            grid.add_row(
                Text(stage["name"], "bold" if slowest else ""),
                ProgressBar(stage["total"] or 1, min(stage["done"], stage["total"] or 1), width=24),
                f"{stage['done']}" + (f"/{stage['total']}" if stage["total"] is not None else ""),
                _figure(stage["rows_s"], ".2g"),
                _figure(stage["busy"], ".0%"),
                str(stage["in_flight"]),
                _figure(stage["tokens_s"], ",.0f"),
                Text(str(stage["errors"]), "red" if stage["errors"] else ""),
                duration(stage["left_s"]) if stage["left_s"] else "",
            )
    said = [f"{view['what']}: {duration(view['elapsed_s'])}"]
    if view.get("slowest"):
        said.append(f"{view['slowest']} is slowest")
    if view["left_s"]:
        said.append(f"{duration(view['left_s'])} left")
    if view.get("spent"):
        said.append(f"{view['spent']:.2f} paid")
    failed = [
        Text(f"{stage['name']}: {_short(stage['reason'])}", "red")
        for stage in view.get("stages", ())
        if stage["errors"]
    ]
    return Group(grid, *failed, Text(" · ".join(said), "dim"))


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
