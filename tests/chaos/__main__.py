"""`PYTHONPATH=tests python -m chaos`: faults of every kind against real runs, and a table of what became
of them. Exit status 1 when a row was lost or duplicated, or a run did not go on by itself.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from chaos.alone import Alone
from chaos.faults import NAMES, draw, share_out
from chaos.generation import Generation, Rendering
from chaos.nodes import Nodes
from chaos.scene import ChaosError, Disturbed, Scene
from chaos.serving import Serving
from chaos.table import Record, records_of, table
from chaos.training import Training
from chaos.two_drivers import TwoDrivers

SCENES: dict[str, type[Scene]] = {
    scene.name: scene for scene in (Generation, Rendering, Training, Serving, Alone, TwoDrivers)
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    work = Path(arguments.work or tempfile.mkdtemp(prefix="vpo-chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    results = work / "results.jsonl"
    records = (
        [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    )
    try:
        for record in attack(arguments, work, {(record["seed"], record["number"]) for record in records}):
            records.append(record)
            with open(results, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
    finally:
        sys.stdout.write(table(records))
    if arguments.work is None:
        shutil.rmtree(work)
    return 0 if all(record["survived"] for record in records) else 1


def attack(arguments: argparse.Namespace, work: Path, done: set[tuple[int, int]]) -> Iterator[Record]:
    """Make the runs, leaving out faults that are `done`; yields a record for each that happened."""
    from vpo_ray.world.tiny import make_tiny

    make_tiny(work / "models")
    drawn = draw(arguments.seed, arguments.faults, arguments.only or NAMES)
    scenes = arguments.scene or list(SCENES)
    faults = [
        fault for fault in drawn if (arguments.seed, fault.number) not in done and fault.kind.scene in scenes
    ]
    say(f"seed {arguments.seed}: {len(faults)} of {len(drawn)} faults are left, runs in {work}")
    runs, left = share_out(faults, arguments.per_run), arguments.runs
    for scene_name in dict.fromkeys(name for name, _ in runs):
        waiting = [faults for name, faults in runs if name == scene_name]
        kind = SCENES[scene_name]
        if not left:
            return
        with Nodes(kind.nodes, kind.head_cpus) as cluster:
            scene = kind(work, work / "models", cluster)
            say(f"{scene_name}: what is undisturbed")
            scene.prepare()
            while waiting and left:
                left -= 1
                now = waiting.pop(0)
                numbers = "-".join(str(fault.number) for fault in now)
                name = f"{scene_name}-seed{arguments.seed}-{numbers}"
                shutil.rmtree(scene.folder / name, ignore_errors=True)
                say(f"{name}: {', '.join(fault.kind.name for fault in now)}")
                disturbed = scene.disturb(now, name)
                tell(disturbed, scene)
                yield from records_of(disturbed, name, arguments.seed)
                if disturbed.left and disturbed.hits:
                    # Their processes had ended before: into a run of their own.
                    waiting.append(list(disturbed.left))
                if disturbed.survived and not arguments.keep:
                    shutil.rmtree(scene.folder / name, ignore_errors=True)


def tell(done: Disturbed, scene: Scene) -> None:
    """What became of a run, a line each."""
    for hit in done.hits:
        say(f"  {hit.fault.kind.name}: {hit.lost_s or 0:.0f} s until it went on")
    lost, duplicated = done.difference.lost, done.difference.duplicated
    for fault in done.left:
        say(f"  {fault.kind.name}: not done, its process had ended before")
    instead = f" instead of {scene.wall_s:.0f}" if scene.wall_s else ""
    say(
        f"  {'survived' if done.survived else 'NOT SURVIVED'}: {done.wall_s:.0f} s{instead}, "
        f"{len(lost)} rows lost, {len(duplicated)} duplicated, {done.failures} failures"
    )
    for what in [*lost[:5], *duplicated[:5], *done.wrong, *(f"left behind: {t}" for t in done.left_behind)]:
        say(f"    {what}")


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=7, help="the same seed draws the same faults")
    parser.add_argument("--faults", type=int, default=64, help="how many to draw")
    parser.add_argument("--only", action="append", choices=NAMES, help="kinds of faults, instead of all")
    parser.add_argument("--scene", action="append", choices=SCENES, help="only these faults of those drawn")
    parser.add_argument("--per-run", type=int, default=6, help="faults of one run at most")
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many runs")
    parser.add_argument(
        "--work", help="folder that is kept: the same command goes on there with the faults that are left"
    )
    parser.add_argument("--keep", action="store_true", help="keep the runs that survived, too")
    return parser


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ChaosError as error:
        raise SystemExit(f"chaos: {error}") from None
