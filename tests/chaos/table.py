"""The table of faults and what became of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from chaos.faults import NAMES
from chaos.scene import Disturbed

Record = dict[str, Any]
HEAD = ("fault", "tried", "survived", "rows lost", "rows duplicated", "seconds lost")


def records_of(done: Disturbed, run: str, seed: int) -> Iterator[Record]:
    """A line for each fault of a run. What the run lost cannot be told apart by fault: it is told of
    each, with the run's name."""
    for hit in done.hits:
        yield {
            "seed": seed,
            "number": hit.fault.number,
            "fault": hit.fault.kind.name,
            "run": run,
            "survived": done.survived,
            "lost": len(done.difference.lost),
            "duplicated": len(done.difference.duplicated),
            "seconds": round(hit.lost_s or 0, 1),
            "failures": done.failures,
            "left_behind": list(done.left_behind),
        }


def table(records: Sequence[Record]) -> str:
    """The faults by kind: how many, in how many runs that ended as undisturbed ones do, and seconds
    until the work went on as mean and longest."""
    rows = [HEAD]
    for name in NAMES:
        mine = [record for record in records if record["fault"] == name]
        if mine:
            rows.append((name, *_cells(mine)))
    if records:
        rows.append(("all", *_cells(records)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ) + " |"
        for row in rows
    ]  # fmt: skip
    rule = ["|-" + "-|-".join("-" * width for width in widths) + "-|"]
    return "\n".join([lines[0], *rule, *lines[1:]]) + "\n"


def _cells(records: Sequence[Record]) -> tuple[str, ...]:
    runs = {record["run"]: record for record in records}
    seconds = [record["seconds"] for record in records]
    return (
        str(len(records)),
        str(sum(record["survived"] for record in records)),
        str(sum(record["lost"] for record in runs.values())),
        str(sum(record["duplicated"] for record in runs.values())),
        f"{sum(seconds) / len(seconds):.0f}, at most {max(seconds):.0f}",
    )
