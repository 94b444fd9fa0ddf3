"""How a stream scales with nodes, and when its driver becomes the limit.

    python benchmarks/scale.py
    python benchmarks/scale.py --nodes 1 2 4 --rows 1000 10000 --alone --seconds 20

Two measurements, both with the pipeline's own code (see stream.py, whose sleeping stages these are):

Nodes. Raylets on this machine, each with room for as many replicas as a node of GPUs would have. Rows
grow with the nodes, so that the ideal is the same wall time for all. Efficiency is the share of time in
which the render replicas of all nodes work, from the first row's start to the last row's end; `machine`
is the share of this machine's CPU time that was used meanwhile: where it is near 1, it was measured, and
not the stream. `fill_s` and `tail_s` are the fixed costs at both ends, which a longer run spreads.

Driver. Stages that do nothing, in a fresh process for each number of rows: CPU seconds of the driver's
process for each row, and its memory. `alone` has blocks of one row, as renders have them: from CPU
seconds a row follows how many rows a second one driver can feed, and so how many GPUs of a given time
a render. `blocks` has blocks of a hundred rows, so that 100,000 fit into an hour. `cpu_over_plain` is the
ratio to Ray Data by itself: the same rows and blocks through as many pools, without tables and progress.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import stream
from ray.data import ActorPoolStrategy, DataContext

from vpo_ray.stream import pipeline

NODES = (1, 2, 4, 8, 16)
ROWS = (1_000, 10_000, 100_000)
ROWS_ALONE = (500, 2_000)
BLOCK = 100
K = 4
# Render replicas of a node.
RENDERERS = 2
# One scorer for so many of them: half of what the proportions of their seconds allow.
RENDERERS_PER_SCORER = 20
SLOTS = {"sample": "text", "judge": "text", "render": "gpu", "score": "reward"}
# A render of CogVideoX-5B takes 90 s to 112 s on an H100 (see data/video_presets.yaml).
RENDER_S = 90.0
GPUS = 1000
# Above this share of its CPU time the machine itself is what is measured.
MACHINE_FULL = 0.85

log = logging.getLogger("scale")


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """A head that takes no replica, and `nodes` raylets."""
    from ray.cluster_utils import Cluster

    # The paths of Ray's sockets may have 107 characters, so its folder has a short name.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # There Ray writes which cluster is the current one of this machine.
        Path(folder, "ray").mkdir()
        os.environ |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        store = {"object_store_memory": 200 * 2**20}
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "temp_dir": folder, **store},
        )
        for _ in range(nodes):
            # Of each CPU, Ray starts a process beforehand.
            made.add_node(num_cpus=1, resources={"gpu": RENDERERS, "text": 2, "reward": 1}, **store)
        made.wait_for_nodes(timeout=300)
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = 600
        try:
            yield
        finally:
            ray.shutdown()
            made.shutdown()


def machine_seconds() -> tuple[float, float]:
    """CPU seconds of the whole machine since it started: used, and all."""
    ticks = [int(n) for n in Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / 100, sum(ticks) / 100


def on_nodes(nodes: int, seconds: float, renders: int) -> dict[str, Any]:
    """Run the sleeping pipeline on so many nodes.

    Args:
        seconds: of a render.
        renders: of each replica.
    """
    replicas = nodes * RENDERERS
    queries = round(replicas * renders / stream.ALIGNED / K)
    sizes = {"sample": 1, "judge": 1, "render": replicas, "score": -(-replicas // RENDERERS_PER_SCORER)}
    sections = {"sample": "sample", "judge": "judge", "render": "render", "score": "reward"}
    pools = [
        f"{sections[name]}.pool={{size: {size}, num_cpus: 0.01, resources: {{{SLOTS[name]}: 1}}}}"
        for name, size in sizes.items()
    ]
    stream.POOLS.update(sizes)
    with tempfile.TemporaryDirectory() as folder, cluster(nodes):
        naps = Path(folder) / "naps"
        naps.mkdir()
        stream.put_to_sleep(str(naps), seconds / stream.COSTS["render"])
        recipe, run = stream.prepare(f"{folder}/run", queries, pools)
        warm_up(nodes)
        cpu, wall, machine = time.process_time(), time.monotonic(), machine_seconds()
        pipeline.generate(recipe, run, pipeline.Models("no model", "benchmark"))
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        used, all_ = (now - then for now, then in zip(machine_seconds(), machine, strict=True))
        rows = run.table("feedback").count()
        assert rows == queries * K
        done = stream.read_naps(naps, "render")
        everything = [nap for stage in stream.STAGES for nap in stream.read_naps(naps, stage)]
    work = sum(end - start for start, end in done)
    span = stream.span(everything)
    tail = stream.tail(done, replicas)
    return {
        "render_replicas": replicas,
        "rows": rows,
        "renders": len(done),
        "efficiency": round(work / (replicas * span), 4),
        "efficiency_without_tail": round(_before_tail(done, replicas), 4),
        "wall_s": round(span, 1),
        "ideal_s": round(work / replicas, 1),
        "fill_s": round(min(s for s, _ in done) - min(s for s, _ in everything), 2),
        "tail_s": round(tail, 2),
        "start_s": round(wall - span, 1),
        "driver_cpu_s_per_row": round(cpu / rows, 4),
        "machine": round(used / all_, 3),
        "machine_was_the_limit": used / all_ > MACHINE_FULL,
    }


def _before_tail(naps: Sequence[tuple[float, float]], replicas: int) -> float:
    """Busy share from the first render's start to the moment that a replica had nothing left to do."""
    begin, end = min(s for s, _ in naps), sorted(end for _, end in naps)[-replicas]
    return sum(max(0.0, min(e, end) - s) for s, e in naps) / (replicas * (end - begin))


def warm_up(nodes: int) -> None:
    """Have a started process for every replica on its node; see stream.warm_up."""

    @ray.remote(num_cpus=0)
    def start() -> None:
        import ray.data  # noqa: F401

        time.sleep(2)

    wanted = {"gpu": nodes * RENDERERS, "text": 2, "reward": 1}
    ray.get([start.options(resources={kind: 1}).remote() for kind, n in wanted.items() for _ in range(n)])


def driver(rows: int, block: int) -> dict[str, float]:
    """CPU seconds and memory of the driver for so many rows through stages that do nothing."""
    sizes = [f"render.batch_size={block}", f"reward.batch_size={block}"]
    if block > 16:
        sizes += [f"{key}.engine.batch_size={block}" for key in ("sample", "judge")]
    with tempfile.TemporaryDirectory() as folder, stream.cluster():
        peer = plain(rows, [max(block, 16), max(block, 16), block, block])
        stream.put_idle()
        recipe, run = stream.prepare(f"{folder}/run", rows // K, [*stream.ONE_REPLICA, *sizes])
        before, cpu, wall = stream.status("RssAnon"), time.process_time(), time.monotonic()
        with stream.Memory() as memory:
            pipeline.generate(recipe, run, pipeline.Models("no model", "benchmark"))
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        assert run.table("feedback").count() == rows // K * K
    return {
        "block": block,
        "cpu_s": round(cpu, 2),
        "cpu_s_per_row": round(cpu / rows, 6),
        "plain_cpu_s": round(peer, 2),
        "wall_s": round(wall, 1),
        "memory_mb": round(memory.private, 1),
        "more_memory_mb": round(memory.private - before, 1),
    }


class Same:
    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def plain(rows: int, blocks: Sequence[int]) -> float:
    """CPU seconds of this process for so many rows through Ray Data by itself, with its own settings: a pool
    of one actor for each of `blocks`, the rows of its blocks."""
    cpu, dataset, flowing = time.process_time(), ray.data.range(rows, override_num_blocks=1), 0
    for block in blocks:
        if block != flowing:
            dataset = dataset.repartition(target_num_rows_per_block=block)
        dataset = dataset.map_batches(
            Same,
            batch_size=block,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.01,
        )
        flowing = block
    found = sum(batch.num_rows for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert found == rows
    return time.process_time() - cpu


def drivers(rows: Sequence[int], block: int) -> dict[str, Any]:
    """`driver` for each size, in a process of its own, and what follows from the largest two."""
    found: dict[str, Any] = {}
    for count in rows:
        command = [sys.executable, __file__, "--inside", str(count), "--block", str(block)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[str(count)] = json.loads(output.splitlines()[-1])
        log.info("driver, %d rows: %s", count, found[str(count)])
    first, last = found[str(rows[0])], found[str(rows[-1])]
    # The difference of two sizes leaves out what is paid once.
    more = (rows[-1] - rows[0]) or rows[0]
    cpu = (last["cpu_s"] - (first["cpu_s"] if len(rows) > 1 else 0)) / more
    peer = (last["plain_cpu_s"] - (first["plain_cpu_s"] if len(rows) > 1 else 0)) / more
    return {
        "sizes": found,
        "cpu_s_per_further_row": round(cpu, 6),
        "plain_cpu_s_per_further_row": round(peer, 6),
        "cpu_over_plain": round(cpu / peer, 3),
        "rows_per_s_of_one_driver": round(1 / cpu, 1),
        f"gpus_that_one_driver_feeds_at_{RENDER_S:g}_s_a_render": round(RENDER_S / cpu),
        f"share_of_a_core_at_{GPUS}_gpus": round(GPUS / RENDER_S * cpu, 4),
        "bytes_per_further_row": round((last["memory_mb"] - first["memory_mb"]) * 1e6 / more),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Efficiency on 1 to 16 nodes; cost of the driver by rows.")
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES, help="default: 1 2 4 8 16")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="default: 1000 10000 100000")
    parser.add_argument(
        "--alone", type=int, nargs="*", default=ROWS_ALONE, help="rows in blocks of one (500 2000)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds a render (%(default)s)")
    parser.add_argument("--renders", type=int, default=15, help="renders of each replica (%(default)s)")
    parser.add_argument("--block", type=int, default=BLOCK, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if args.inside:
        sys.stdout.write(json.dumps(driver(args.inside, args.block)) + "\n")
        return
    result: dict[str, Any] = {"seconds_a_render": args.seconds, "cpus_of_this_machine": os.cpu_count()}
    result["nodes"] = {}
    for nodes in args.nodes:
        result["nodes"][str(nodes)] = on_nodes(nodes, args.seconds, args.renders)
        log.info("%d nodes: %s", nodes, result["nodes"][str(nodes)])
    for name, rows, block in (("alone", args.alone, 1), ("blocks", args.rows, BLOCK)):
        if rows:
            result[f"driver_{name}"] = drivers(sorted(rows), block)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
