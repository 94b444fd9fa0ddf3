"""`vpo status`, `vpo runs`, `vpo logs`: look at runs from elsewhere, by what their directories say.

They change nothing, and read what object stores hold as well as a disk. Only the logs of living processes
need the run's cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vpo_ray import terminal

if TYPE_CHECKING:
    from vpo_ray.records import Row
    from vpo_ray.storage.run_dir import RunDir

T = TypeVar("T")

STATUS_HELP = "how far the runs below a folder are, or one run"
RUNS_HELP = "list the runs below a folder: state, funnel, cost, evaluation"
LOGS_HELP = "why rows of a run failed, and the last lines of its replicas and workers, dead or alive"
# Lines of each log that are shown.
TAIL = 40


def add_status(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "a run directory, or a folder of them (runs)")
    parser.add_argument("--json", action="store_true", help="what the runs say of themselves, as a JSON list")
    parser.set_defaults(command=show_status)


def add_runs(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "folder or URI (runs)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    parser.set_defaults(command=show_runs)


def add_logs(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser, "run directory or URI, or a folder with one run (runs)")
    parser.add_argument("--stage", metavar="STAGE", help="of this stage or phase only: render, sft, ...")
    parser.add_argument("--row", metavar="ID", help="a row by its id, or by how the id begins")
    parser.set_defaults(command=show_logs)


def _add_folder(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help=what)
    parser.add_argument("--out", metavar="DIR", help="the same")


def _folder(arguments: argparse.Namespace) -> str:
    """Raises RecipeError: two folders, or one that is named and not there."""
    from vpo_ray.files.folder import Folder
    from vpo_ray.recipe import RecipeError

    if None not in (arguments.folder, arguments.out) and arguments.folder != arguments.out:
        raise RecipeError(f"{arguments.folder} and --out {arguments.out}: give one folder")
    named = arguments.folder if arguments.folder is not None else arguments.out
    if named is None:
        return "runs"
    folder = Folder(named)
    if folder.is_local and not os.path.isdir(folder.path):
        raise RecipeError(f"there is no folder {named}: give a run's `out`, or a folder of runs")
    return str(named)


def show_status(arguments: argparse.Namespace) -> int:
    """The last view of every run that runs; of the newest where none does, or where one is named."""
    from vpo_ray.storage.run_state import states
    from vpo_ray.stream.status_text import status_line, status_table

    all_states, faults = _of_each(_runs(_folder(arguments)), states)
    found = [(run, state) for run, said in all_states for state in said]
    if arguments.json:
        sys.stdout.write(json.dumps([{"run": run.uri, **state} for run, state in found], indent=2) + "\n")
        return _complain(faults)
    if not found:
        sys.stdout.write(f"{_folder(arguments)}: no run has said anything here\n")
        return _complain(faults)
    active = [entry for entry in found if entry[1].get("state") in ("running", "silent")]
    for run, state in active or [max(found, key=lambda entry: entry[1]["updated"])]:
        sys.stdout.write(f"{run.uri}: {_said(state)}\n")
        if state.get("error"):
            sys.stdout.write(f"  {_printable(state['error'])}\n")
        if (view := state.get("view")) is None:
            continue
        if sys.stdout.isatty():
            from rich.console import Console

            Console(file=sys.stdout).print(status_table(view))
        else:
            sys.stdout.write(f"  {status_line(view)}\n")
    return _complain(faults)


def _of_each(runs: Sequence[RunDir], look: Callable[[RunDir], T]) -> tuple[list[tuple[RunDir, T]], list[str]]:
    """What there is to see of each run, and why some cannot be read, which hide no other."""
    found: list[tuple[RunDir, T]] = []
    faults: list[str] = []
    for run in runs:
        try:
            found.append((run, look(run)))
        except Exception as error:
            if len(runs) == 1:
                raise
            faults.append(f"{run.uri} cannot be read: {type(error).__name__}: {error}")
    return found, faults


def _complain(faults: Sequence[str]) -> int:
    """Say what cannot be read; returns the exit status."""
    for fault in faults:
        terminal.ours().write(f"vpo: error: {fault}\n")
    return 1 if faults else 0


def _said(state: Row) -> str:
    from vpo_ray.storage.run_state import worked_s
    from vpo_ray.stream.status_text import duration

    what = {"silent": f"no word from its driver for {duration(time.time() - state['updated'])}"}
    said = what.get(state.get("state", ""), state.get("state") or "working")
    said += f", shard {state['shard']}" if state.get("shard") else ""
    said += f", {state['place']}" if state.get("place") else ""
    if state.get("doing") and state.get("state") in ("running", "silent", "failed", "stopped"):
        said += f" in {state['doing']}"
    if "began" in state:
        said += f", {duration(worked_s(state, time.time()))}"
    return f"{said} ({state.get('host')}, process {state.get('pid')})"


def show_runs(arguments: argparse.Namespace) -> int:
    """A line for each run."""
    found, faults = _of_each(_runs(_folder(arguments)), _entry)
    entries = [entry for _, entry in found]
    if arguments.json:
        sys.stdout.write(json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
        return _complain(faults)
    rows = [("run", "state", "queries → pairs", "paid", "evaluation"), *map(_cells, entries)]
    if len(rows) == 1:
        sys.stdout.write(f"{_folder(arguments)}: no run is here\n" if not faults else "")
        return _complain(faults)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    return _complain(faults)


def _entry(run: RunDir) -> Row:
    """What there is to say of a run in a line; `evaluation` is of its newest."""
    from vpo_ray.loop.ledger import funnel
    from vpo_ray.storage.run_state import states

    ledger: Row = run.read_json("ledger.json") if run.exists("ledger.json") else {}
    return {
        "run": run.uri,
        "states": dict(Counter(state.get("state") or "working" for state in states(run))),
        "funnel": funnel(ledger) if ledger else {},
        "paid": ledger.get("paid", {}).get("cost"),
        "evaluation": _evaluation(run),
    }


def _cells(entry: Row) -> tuple[str, str, str, str, str]:
    state = ", ".join(name if n == 1 else f"{n} {name}" for name, n in entry["states"].items())
    shown = " → ".join(str(count) for count in entry["funnel"].values())
    paid = "" if entry["paid"] is None else f"{entry['paid']:.2f}"
    evaluation = ""
    if found := entry["evaluation"]:
        values = ", ".join(f"{policy} {value:.3f}" for policy, value in found["values"].items())
        evaluation = f"{found['measure']}: {values}"
    return entry["run"], state or "unknown", shown, paid, evaluation


def _evaluation(run: RunDir) -> Row | None:
    """How the last policy compares with the queries as they are, by the first measure that says so."""
    results = run.newest_evaluation()
    if results is None:
        return None
    order = results.get("order", [])
    for models in results.get("results", {}).values():
        for policies in models.values():
            first, last = policies.get(order[0], {}), policies.get(order[-1], {})
            for metric in sorted(
                set(first) & set(last), key=lambda name: (not name.startswith("reward"), name)
            ):
                values = {order[0]: first[metric].get("value"), order[-1]: last[metric].get("value")}
                if None not in values.values():
                    return {"id": results.get("id"), "measure": metric, "values": values}
    return None


def show_logs(arguments: argparse.Namespace) -> int:
    """Failed rows with their reasons, and what dead and living processes said last."""
    from vpo_ray.storage.run_state import states

    run, wanted = _run(_folder(arguments)), arguments.stage
    if arguments.row is not None:
        return _show_row(run, arguments.row)
    said, known = False, states(run)
    for state in known:
        if state.get("error") and not wanted:
            sys.stdout.write(f"{_said(state)}\n  {_printable(state['error'])}\n")
            said = True
    for place, part in run.with_inner():
        said = _show_failures(part, place, wanted) or said
    if not said:
        sys.stdout.write(f"{run.uri}: nothing failed{f' in {wanted}' if wanted else ''}\n")
    for state in known:
        _show_living(state, wanted)
    return 0


def _show_failures(run: RunDir, place: str, wanted: str | None) -> bool:
    """Why rows of one run directory failed, and its dead processes' logs; whether there are any.

    Args:
        place: of it in the run, such as rounds/2.
    """
    reasons = Counter(
        (row["error_stage"], _printable(row["error"]))
        for _, row in _rows(run)
        if row["error"] is not None and wanted in (None, row["error_stage"])
    )
    where = f"{place}: " if place else ""
    for (stage, reason), count in reasons.most_common():
        sys.stdout.write(f"{where}{stage}: {count} rows: {reason}\n")
    names = [name for name in (run / "logs").files() if wanted is None or name.startswith(f"{wanted}-")]
    for name in names:
        _show_log(run.at(f"logs/{name}"), (run / "logs").read(name).decode(errors="replace"))
    return bool(reasons or names)


def _show_living(state: Row, wanted: str | None) -> None:
    """What the replicas and workers of a driver that works write, or why they cannot be asked."""
    from vpo_ray.stream.live_logs import ClusterGoneError, living_logs

    if state.get("state") not in ("running", "silent") or not state.get("cluster"):
        return
    try:
        for name, text in living_logs(state["cluster"], wanted, TAIL):
            _show_log(f"{name} (alive)", text)
    except ClusterGoneError as error:
        sys.stdout.write(f"\nliving processes: {error}. Ask on a node of the cluster that the run is on\n")


def _show_log(name: str, text: str) -> None:
    lines = text.splitlines()[-TAIL:]
    sys.stdout.write(f"\n{name}\n" + "".join(f"  {_printable(line)}\n" for line in lines))


def _show_row(run: RunDir, beginning: str) -> int:
    found = [entry for _, part in run.with_inner() for entry in _rows(part, beginning)]
    for name, row in found:
        sys.stdout.write(f"{name} {row[_key_of(name)]}\n")
        sys.stdout.writelines(
            f"  {column:<14} {_printable(value)}\n"
            for column, value in row.items()
            if value is not None and column != _key_of(name)
        )
    if not found:
        terminal.ours().write(f"vpo: error: {run.uri} has no row whose id begins with {beginning!r}\n")
    return 0 if found else 2


def _rows(run: RunDir, beginning: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows of the tables that have a place for errors, each as the last table of its chain has it, with that
    table's name: all columns of those whose id begins so, or the errors of all."""
    from vpo_ray.storage.run_dir import TABLES

    found: dict[str, tuple[str, Row]] = {}
    for name, (schema, key) in TABLES.items():
        if "error_stage" not in schema.names or not run.table(name).parts():
            continue
        columns = [key, "error_stage", "error"] if beginning is None else None
        for row in run.table(name).rows(columns):
            if beginning is None or row[key].startswith(beginning):
                found[row[key]] = name, row
    yield from found.values()


def _key_of(table: str) -> str:
    from vpo_ray.storage.run_dir import TABLES

    return TABLES[table][1]


def _run(uri: str) -> RunDir:
    from vpo_ray.files.folder import StorageError

    found = _runs(uri)
    if len(found) == 1:
        return found[0]
    if found:
        raise StorageError(f"{uri} holds {len(found)} runs, name one: {', '.join(run.uri for run in found)}")
    raise StorageError(f"{uri} is no run directory: it has no versions.json. Give the recipe's `out`")


def _runs(uri: str) -> list[RunDir]:
    """The run itself, or those in a folder, with what may be one and cannot be read: see `_of_each`."""
    from vpo_ray.files.folder import StorageError
    from vpo_ray.storage.run_dir import RunDir

    def may_be_one(found: RunDir) -> bool:
        try:
            return found.exists("versions.json")
        except StorageError:
            return True

    folder = RunDir(uri)
    if folder.exists("versions.json"):
        return [folder]
    return [run for name in folder.folders() if may_be_one(run := RunDir(folder.at(name)))]


def _printable(value: Any) -> str:
    text = str(value).replace("\n", "\n  ")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
