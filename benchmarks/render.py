"""What the render stage costs beside the pipeline call itself, and how fast the store answers.

    python benchmarks/render.py

On the tiny CogVideoX, slowed to about 2 s a video by its number of steps, the same videos are made
by bare pipeline calls and by the stage (look-up, render, checks, encoding, hashing, writing), in
turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Render
from vpo_ray.records import Row
from vpo_ray.stages.render import Renderer
from vpo_ray.world.tiny import make_video

PROBE_STEPS = 60
log = logging.getLogger("render")


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of the render stage, and store hits a second.")
    parser.add_argument("--videos", type=int, default=4, help="videos of a round (%(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="rounds; the fastest counts (%(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=2, help="seconds a video (%(default)s)")
    parser.add_argument("--hits", type=int, default=5000, help="look-ups (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_video(f"{folder}/video")
        model = f"{folder}/video"
        settings = Render(model=model, dtype="float32", frames=9, height=64, width=96, steps=PROBE_STEPS)
        settings = settings.model_copy(update={"steps": steps_for(args.seconds, settings)})
        log.info("%d steps a video", settings.steps)
        result = overhead(settings, folder, args.videos, args.rounds) | hits(settings, folder, args.hits)
    sys.stdout.write(json.dumps(result) + "\n")


def steps_for(seconds: float, settings: Render) -> int:
    engine = VideoEngine(settings)
    bare(engine, rows("warm", 1))
    return max(1, round(PROBE_STEPS * seconds / timed(lambda: bare(engine, rows("probe", 1)))))


def overhead(settings: Render, folder: str, videos: int, rounds: int) -> dict[str, float]:
    """Seconds of the stage over seconds of the bare calls: rows in one block, and in blocks of one
    with two calls in flight as an actor of the pool has them."""
    engine = VideoEngine(settings)
    bare(engine, rows("warm", 1))
    renderer = Renderer(settings, f"{folder}/overhead", 0)
    warm_up = timed(lambda: renderer(rows("warm", 1)))
    seconds: dict[str, list[float]] = {"bare": [], "block": [], "blocks_of_one": []}
    with ThreadPoolExecutor(2) as calls:
        for number in range(rounds):
            work = {
                "bare": lambda n=number: bare(engine, rows(f"bare {n}", videos)),
                "block": lambda n=number: renderer(rows(f"block {n}", videos)),
                "blocks_of_one": lambda n=number: list(
                    calls.map(renderer, [[row] for row in rows(f"one {n}", videos)])
                ),
            }
            for name, job in work.items():
                seconds[name].append(timed(job) / videos)
                log.info("round %d %s: %.3f s a video", number, name, seconds[name][-1])
    assert renderer.rendered == 1 + 2 * rounds * videos
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "bare_s_per_video": round(best["bare"], 3),
        "stage_s_per_video": round(best["block"], 3),
        "overhead": round(best["block"] / best["bare"], 4),
        "overhead_blocks_of_one": round(best["blocks_of_one"] / best["bare"], 4),
        "first_call_s": round(warm_up, 2),
    }


def hits(settings: Render, folder: str, count: int) -> dict[str, float]:
    """Rows a second of a second run, with videos of the tiny model's size and of 1 MB (a real
    model's): each look-up reads the sidecar and asks for the video's length and time."""
    result = {}
    for name, size in (("tiny", 20_000), ("1MB", 1_000_000)):
        renderer = Renderer(settings, f"{folder}/hits-{name}", 0)
        asked = rows("hit", min(count, 2000 if name == "tiny" else 500))
        shape = {"frames": 9, "fps": 8.0, "width": 96, "height": 64}
        for row in asked:
            renderer.store.write(renderer._job(row).key, bytes(size), shape)
        blocks = [[row] for row in asked] * max(1, count // len(asked))
        seconds = timed(lambda b=blocks, r=renderer: [r(block) for block in b])
        result[f"hits_per_s_{name}"] = round(len(blocks) / seconds)
        assert renderer.rendered == 0
    return result


def rows(name: str, count: int) -> list[Row]:
    common = {"query_id": "q", "query": "a query", "k": 0, "seed": 0, "verdict": "aligned"}
    return [{"candidate_id": f"{name} {i}", "prompt": f"{name} {i}", **common} for i in range(count)]


def bare(engine: VideoEngine, asked: list[Row]) -> None:
    """The pipeline call alone, as a script around diffusers would make it."""
    for row in asked:
        generator = torch.Generator("cpu").manual_seed(0)
        engine.pipeline(prompt=[row["prompt"]], generator=[generator], output_type="pt", **engine._call)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
