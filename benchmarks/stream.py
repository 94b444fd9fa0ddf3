"""How busy the stream keeps its most expensive pool, and what the driver costs as input grows.

    python benchmarks/stream.py
    python benchmarks/stream.py --memory

Everything is the pipeline's own (reading, blocks, pools, tables, restarts, draining) but three
things that only sleep: the engine under the two text stages, the renderer and the scorer. vLLM's
own actor takes ten seconds of CPU to import, so the text stages run in an async actor of the same
shape and settings as the one `ray.data.llm` makes. Seconds are in the proportions of the real ones.

The first command compares one stream with the same stages run one after another, each over the
table before it. Start-up is left out: Ray's processes are started beforehand, rows are let in when
all replicas stand, and the clock runs from the first row's start to the last row's end.

With `--memory` nothing sleeps and blocks are large; the driver's memory is measured in a fresh
process for each number of queries. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from vpo_ray.engines.chat import Answer, ChatStage, Message, Sampling
from vpo_ray.files.folder import chunks
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id, share_of
from vpo_ray.stages import render, spec
from vpo_ray.stages.spec import Making
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream import pipeline, stage_pools
from vpo_ray.stream.actor_pools import RESTARTS, ChatRunner, Outcome
from vpo_ray.stream.passes import Replicas, VllmModel

# Seconds of one replica for one row (of the text stages: for one answer), and replicas.
COSTS = {"sample": 0.2, "judge": 0.3, "render": 90.0, "score": 2.0}
STAGES = spec.names("generation")
ONE_REPLICA = [f"{s}.pool={{size: 1, num_cpus: 0.01}}" for s in ("sample", "judge", "render", "reward")]
POOLS = {"sample": 2, "judge": 2, "render": 8, "score": 2}
ALIGNED = 0.8  # share of candidates that are rendered
JITTER = 0.1  # a row costs up to this much more or less, so that replicas do not work in step
QUERIES_PER_PART = 1000
MEMORY_SIZES = (1_000, 10_000, 100_000)
MB = 1e6
# Ray's processes: 14 replicas, a few of Ray's own actors, and what reads and splits.
PROCESSES = 24

log = logging.getLogger("stream")


class Naps:
    """Sleeps in place of work, and notes when: one line `start end` in a file of each process."""

    def __init__(self, folder: str, stage: str, scale: float) -> None:
        self.file, self.seconds = f"{folder}/{stage}", COSTS[stage] * scale

    def of(self, row_id: str) -> float:
        return self.seconds * (1 + JITTER * (2 * share_of(row_id) - 1))

    @contextmanager
    def noted(self) -> Iterator[None]:
        start = time.time()
        yield
        with open(f"{self.file}-{os.getpid()}", "a", encoding="utf-8") as lines:
            lines.write(f"{start} {time.time()}\n")


class SleepingChat:
    """An engine that works on `slots` answers at once and is done with one every `naps.seconds`."""

    def __init__(self, naps: Naps, slots: int) -> None:
        self.naps, self.count, self.slots = naps, slots, asyncio.Semaphore(slots)

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        with self.naps.noted():
            async with self.slots:
                await asyncio.sleep(self.count * self.naps.of(str(sampling.seed)))
        asked = schema["properties"] if schema else {}
        if "verdict" in asked:
            verdict = "aligned" if share_of(sampling.seed, "verdict") < ALIGNED else "imprecise"
            found = {"critique": "It could say more.", "missing": [], "added": [], "verdict": verdict}
            text = json.dumps(found)
        else:
            text = f"A long and careful caption, take {sampling.seed}."
            text = json.dumps({"prompt": text}) if asked else text
        return Answer(text, "stop", 50, 12)


class SleepingTextActor:
    """What `VllmStageActor` does with rows, without an engine."""

    def __init__(self, stage: Callable[[], ChatStage], outcome: Outcome, naps: Naps, slots: int) -> None:
        self.run = ChatRunner(stage(), SleepingChat(naps, slots), outcome)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        yield await self.run(batch)


def sleeping_text_pool(
    stream: Dataset,
    stage: Callable[[], ChatStage],
    outcome: Outcome,
    replicas: Replicas,
    model: VllmModel,
    *,
    folder: str,
    scale: float,
) -> Dataset:
    """In place of `stage_pools._vllm_pool`: the same blocks, concurrency and tasks in flight."""
    pool, engine = replicas.pool, model.engine
    naps = Naps(folder, outcome.stage, scale)
    return stream.map_batches(
        SleepingTextActor,
        fn_constructor_kwargs={
            "stage": stage,
            "outcome": outcome,
            "naps": naps,
            "slots": engine.max_num_seqs,
        },
        batch_size=replicas.batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            min_size=pool.size[0],
            max_size=pool.size[1],
            max_tasks_in_flight_per_actor=2 * engine.max_concurrent_batches,
        ),
        max_concurrency=engine.max_concurrent_batches,
        num_cpus=pool.num_cpus,
        **RESTARTS,
    )


class SleepingRenderer:
    """In place of `Renderer`: several calls may be inside, one of them has the device."""

    name = "render"
    wants = staticmethod(render.wants)

    def __init__(self, *_: Any, naps: Naps) -> None:
        self.naps, self.device = naps, threading.Lock()

    def __call__(self, rows: list[Row]) -> list[Row]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row:
        with self.device, self.naps.noted():
            time.sleep(self.naps.of(row["candidate_id"]))
        return {**row, "video_key": row["candidate_id"], "video_uri": f"videos/{row['candidate_id']}.mp4"}


class SleepingScorer:
    """In place of `Scorer`."""

    name = "score"

    def __init__(self, *_: Any, naps: Naps) -> None:
        self.naps = naps

    def wants(self, row: Row) -> bool:
        return row["video_key"] is not None and row["score"] is None and row["error"] is None

    def __call__(self, rows: list[Row]) -> list[Row]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row:
        with self.naps.noted():
            time.sleep(self.naps.of(row["candidate_id"]))
        return {**row, "reward": "none", "answers": [], "dimensions": [], "score": 0.5}


class Idle:
    """Any stage, doing nothing: it fills the one column that the next stage looks at."""

    FILLS: ClassVar = {
        "sample": {"prompt": "a long and careful caption"},
        "judge": {"verdict": "aligned"},
        "render": {"video_key": "none"},
        "score": {"score": 0.5},
    }

    def __init__(self, name: str) -> None:
        self.name, self.fills = name, self.FILLS[name]

    def wants(self, row: Row) -> bool:
        return row["error"] is None and all(row[column] is None for column in self.fills)

    def __call__(self, rows: list[Row]) -> list[Row]:
        return [{**row, **self.fills} for row in rows]


def put_idle() -> None:
    """Replace every stage by one that does nothing."""
    for name in STAGES:
        make = partial(_idle, name)
        spec.STAGES[name] = replace(spec.stage(name), runs_on="batch", calls=lambda recipe: 1, make=make)


def _idle(name: str, making: Making) -> Callable[[], Idle]:
    return partial(Idle, name)


def put_to_sleep(folder: str, scale: float) -> None:
    """Replace what would need models; all else of the pipeline stays as it is."""
    stage_pools._vllm_pool = partial(sleeping_text_pool, folder=folder, scale=scale)
    for name, sleeping in (("render", SleepingRenderer), ("score", SleepingScorer)):
        stage = partial(sleeping, naps=Naps(folder, name, scale))
        spec.STAGES[name] = replace(spec.stage(name), make=lambda making, stage=stage: stage)


def prepare(folder: str, queries: int, overrides: Sequence[str] = ()) -> tuple[Recipe, RunDir]:
    """A recipe with the pools of this benchmark and a run directory with queries in it."""
    sections = {"sample": "sample", "judge": "judge", "render": "render", "score": "reward"}
    pools = [f"{sections[s]}.pool={{size: {n}, num_cpus: 0.01}}" for s, n in POOLS.items()]
    recipe = load(Path(__file__).parents[1] / "jobs/recipes/tiny.yaml", [*pools, *overrides, f"out={folder}"])
    run = RunDir(folder)
    texts = (f"a person walks a dog in the park, number {i}" for i in range(queries))
    rows = ({"query_id": query_id(t), "query": t, "source": "benchmark", "split": "dpo"} for t in texts)
    for chunk in chunks(rows, QUERIES_PER_PART):
        run.table("queries").append(chunk)
    return recipe, run


@contextmanager
def cluster() -> Iterator[None]:
    """A cluster of this machine alone. Logical CPUs are of no matter: replicas only sleep."""
    # The paths of Ray's sockets may have 107 characters, so its folder has a short name.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=PROCESSES,
            object_store_memory=500 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = 300
        try:
            yield
        finally:
            ray.shutdown()


def warm_up() -> None:
    """Have a started process for every replica and task: with a thousandth of a real run's time,
    the seconds that a process takes to start would count for hours."""

    @ray.remote(num_cpus=1)
    def start() -> None:
        import ray.data  # noqa: F401

        time.sleep(2)

    ray.get([start.remote() for _ in range(PROCESSES)])


def execution(queries: int, seconds: float, together: bool) -> dict[str, Any]:
    """Run all stages, as one stream or each by itself, and read off how busy the pools were."""
    scale = seconds / COSTS["render"]
    with tempfile.TemporaryDirectory() as folder:
        naps = Path(folder) / "naps"
        naps.mkdir()
        put_to_sleep(str(naps), scale)
        recipe, run = prepare(f"{folder}/run", queries)
        models = pipeline.Models("no model", "benchmark")
        wall = 0.0
        for stages in [tuple(STAGES)] if together else [(name,) for name in STAGES]:
            warm_up()
            pipeline.generate(recipe, run, models, stages)
            wall += span([nap for stage in stages for nap in read_naps(naps, stage)])
        rows = list(run.table("feedback").rows(["error", "seconds"]))
        assert len(rows) == queries * recipe.sample.k
        assert all(row["error"] is None for row in rows)
        renders = read_naps(naps, "render")
        rendering = sum(end - start for start, end in renders)
        replicas = POOLS["render"]
        charged = sum(row["seconds"]["render"] or 0 for row in rows)
        return {
            "render_busy": round(rendering / (replicas * span(renders)), 4),
            "render_busy_of_wall": round(rendering / (replicas * wall), 4),
            "wall_s": round(wall, 2),
            "stage_s": {stage: round(span(read_naps(naps, stage)), 2) for stage in STAGES},
            "wall_over_bound": round(wall / (rendering / replicas), 4),
            "charged_over_rendered": round(charged / rendering, 4),
            "tail_s": round(tail(renders, replicas), 2),
            "renders": len(renders),
        }


def read_naps(folder: Path, stage: str) -> list[tuple[float, float]]:
    lines = [line for file in folder.glob(f"{stage}-*") for line in file.read_text("utf-8").splitlines()]
    return sorted((float(start), float(end)) for start, end in map(str.split, lines))


def span(naps: list[tuple[float, float]]) -> float:
    """Seconds from the first start to the last end."""
    return max(end for _, end in naps) - min(start for start, _ in naps)


def tail(naps: list[tuple[float, float]], replicas: int) -> float:
    """Seconds from the moment that the first replica had nothing left to do to the last end."""
    ends = sorted(end for _, end in naps)[-replicas:]
    return ends[-1] - ends[0]


def busy(queries: int, seconds: float) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": queries * 4, "seconds_a_render": seconds}
    with cluster():
        for name, together in (("stream", True), ("one_after_another", False)):
            result[name] = execution(queries, seconds, together)
            log.info("%s: %s", name, result[name])
    return result


class Memory:
    """The largest private memory of this process while it is open, looked at 10 times a second."""

    def __init__(self) -> None:
        self.private, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.private = max(self.private, status("RssAnon"))


def status(name: str) -> float:
    """MB of one line of this process's status: VmHWM (peak with shared pages), RssAnon (private)."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / MB


def driver_memory(queries: int, block: int) -> dict[str, float]:
    """Run `queries` queries through stages that do nothing, and again when all is done."""
    sizes = [f"{key}.batch_size={block}" for key in ("sample.engine", "judge.engine", "render", "reward")]
    with tempfile.TemporaryDirectory() as folder, cluster():
        put_idle()
        recipe, run = prepare(f"{folder}/run", queries, [*ONE_REPLICA, *sizes])
        models = pipeline.Models("no model", "benchmark")
        result = {"before_mb": status("RssAnon")}
        for name in ("run", "again"):
            start = time.perf_counter()
            with Memory() as memory:
                pipeline.generate(recipe, run, models)
            result |= {f"{name}_mb": memory.private, f"{name}_s": time.perf_counter() - start}
        result |= {"peak_rss_mb": status("VmHWM"), "blocks": len(run.table("feedback").parts())}
        assert run.table("feedback").count() == queries * recipe.sample.k
    return {name: round(value, 1) for name, value in result.items()}


def memory_by_size(block: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for queries in MEMORY_SIZES:
        command = [sys.executable, __file__, "--inside", str(queries), "--block", str(block)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        sizes[str(queries)] = json.loads(output.splitlines()[-1])
        log.info("%d queries: %s", queries, sizes[str(queries)])
    return {"driver": sizes, "rows_per_query": 4, "rows_per_block": block}


def main() -> None:
    parser = argparse.ArgumentParser(description="Busy share of the render pool; memory of the driver.")
    parser.add_argument("--queries", type=int, default=104, help="queries, 4 rows each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds a render (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure the driver's memory instead")
    parser.add_argument("--block", type=int, default=2000, help="rows a block with --memory (%(default)s)")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if args.inside:
        result: dict[str, Any] = driver_memory(args.inside, args.block)
    else:
        result = memory_by_size(args.block) if args.memory else busy(args.queries, args.seconds)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
