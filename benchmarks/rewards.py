"""What Prompt-A-Video's seven columns cost in one pass, against its dearest reward alone.

    python benchmarks/rewards.py

The aesthetic predictor, MPS and VideoScore, of random weights, score the same videos through the score
stage: together in one replica, and each in a replica of its own, one after another, where each reads and
decodes the videos. `tiny` has the sizes of tests, so that reading and decoding is most of it; `middle` has
the published models' proportions. Ways take turns, so that all see the same machine; one thread. The last
line is one JSON object: CPU seconds a video, and one pass in times of the dearest reward, by wall and by CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpo_ray.engines.video.engine import encode
from vpo_ray.recipe import Reward
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore
from vpo_ray.world import tiny_scorers

log = logging.getLogger("rewards")

QUERY = "a red fox walks through deep snow at the edge of a quiet forest"


def shape(width: int, layers: int, heads: int, inner: int, **more: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


PIXELS = {"image_size": 224, "patch_size": 14}
# A tenth of the published widths and a quarter of the layers (facts: the published config.json files).
MIDDLE: dict[str, dict[str, Any]] = {
    "aesthetic": {"vision": shape(104, 6, 4, 408, **PIXELS), "text": shape(80, 3, 4, 304), "projection": 80},
    "mps": {
        "vision": shape(128, 8, 4, 512, **PIXELS),
        "text": shape(104, 6, 4, 408),
        "projection": 104,
        "heads": 4,
        "head_dim": 26,
        "inner": 408,
        "layers": 4,
    },
    "videoscore": {
        "vision": shape(112, 7, 4, 432),
        "text": shape(416, 8, 8, 1432, num_key_value_heads=2),
        "perceiver": {
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 4,
            "resampler_head_dim": 40,
        },
    },
}
# (frames, height, width) of the videos.
CLIPS = {"tiny": (49, 480, 720), "middle": (49, 256, 384)}


def checkpoints(folder: Path, sizes: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """The three rewards, the dearest first."""
    clip = sizes.get("aesthetic", {})
    tiny_scorers.make_tiny_clip(folder / "clip", "quick_gelu", sizes=clip)
    tiny_scorers.make_tiny_heads(folder, clip.get("projection", 48))
    tiny_scorers.make_tiny_mps(folder / "mps", sizes=sizes.get("mps"))
    tiny_scorers.make_tiny_videoscore(folder / "videoscore", sizes.get("videoscore"))
    head = {"clip": f"{folder}/clip", "head": f"{folder}/v1.safetensors"}
    prompt = {"query_prompt": f"{folder}/videoscore/query_prompt.txt"}
    kinds: dict[str, dict[str, Any]] = {
        "videoscore": {"model": f"{folder}/videoscore", "options": prompt},
        "aesthetic": {"kind": "laion_aesthetic", "options": head},
        "mps": {"model": f"{folder}/mps"},
    }
    return {
        name: Reward.model_validate({"kind": name, "device": "cpu", "dtype": "float32", **keys})
        for name, keys in kinds.items()
    }


def clip_of(seed: int, frames: int, height: int, width: int) -> bytes:
    """A moving, noisy gradient at 8 fps."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    film = [((np.sin(x / 90 + t / 4) + np.cos(y / 60 - t / 6) + 2) * 60)[..., None] for t in range(frames)]
    grain = noise.integers(0, 8, (frames, height, width, 1))
    colour = noise.uniform(0.2, 1.0, 3)
    return encode((np.stack(film) * colour + grain).clip(0, 255).astype(np.uint8), 8, 17)


def compare(folder: Path, size: str, videos: int) -> dict[str, Any]:
    rewards = checkpoints(folder, MIDDLE if size == "middle" else {})
    store = VideoStore(folder / "videos")
    for i in range(videos + 1):
        store.write(f"video{i}", clip_of(i, *CLIPS[size]), {})
    dearest, *others = rewards
    together = Scorer(rewards[dearest], store.folder.uri, {name: rewards[name] for name in others})
    alone = {name: Scorer(reward, store.folder.uri) for name, reward in rewards.items()}
    ways: dict[str, Callable[[list[dict[str, Any]]], object]] = {"together": together, **alone}
    spent = {name: np.zeros(2) for name in ways}
    for i in range(videos + 1):
        for name, way in ways.items():
            start = np.array([time.perf_counter(), time.process_time()])
            (row,) = way([{"query": QUERY, "video_key": f"video{i}", "seconds": {}}])  # type: ignore[misc]
            assert row["error"] is None, row["error"]
            if i:  # the first loads and warms
                spent[name] += np.array([time.perf_counter(), time.process_time()]) - start
    each = {name: found / videos for name, found in spent.items()}
    row_of = sum(each[name] for name in rewards)
    log.info("%s: %s", size, {name: found.round(3).tolist() for name, found in each.items()})
    result: dict[str, Any] = {"cpu_seconds": {name: round(found[1], 4) for name, found in each.items()}}
    for number, clock in enumerate(("wall", "cpu")):
        highest = max(each[name][number] for name in rewards)
        result[f"times_the_dearest_{clock}"] = round(each["together"][number] / highest, 3)
        result[f"in_a_row_times_the_dearest_{clock}"] = round(row_of[number] / highest, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seven columns in one pass against the dearest reward alone."
    )
    parser.add_argument("--videos", type=int, default=3, help="of each size, after one to warm (%(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=tuple(CLIPS), default=list(CLIPS))
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    result = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            result[size] = compare(Path(folder), size, args.videos)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
