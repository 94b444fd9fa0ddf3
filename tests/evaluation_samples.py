"""A made-up evaluation: its samples, as `vpo evaluate` leaves them, with videos in the run's store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpo_ray.engines.video.engine import encode
from vpo_ray.evaluation.samples import SAMPLE
from vpo_ray.files.folder import Folder
from vpo_ray.records import content_id, query_id
from vpo_ray.storage.tables import Table
from vpo_ray.storage.videos import VideoStore

POLICIES = ("query", "sft", "dpo")


def clip(seed: int) -> bytes:
    frames = np.full((9, 64, 96, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[20:44, 8 * t : 8 * t + 24] = (seed * 80 % 256, 160, 255 - seed * 80 % 256)
    return encode(frames, fps=8, crf=12)


def sample(query: str, policy: str, **more: Any) -> dict[str, Any]:
    """One row of the set `eval`, with a prompt, an aligned verdict and no video."""
    row = {
        "set": "eval",
        "policy": policy,
        "video_model": "render",
        "query_id": query_id(query),
        "query": query,
        "unsafe": False,
        "seed": 0,
        "prompt": query if policy == "query" else f"{query}, as {policy} wrote it, slowly filmed at dusk.",
        "verdict": "aligned",
        "measures": [],
        **more,
    }
    key = ("set", "policy", "video_model", "query_id", "seed")
    empty = dict.fromkeys(name for name in SAMPLE.names if name not in row)
    return {**empty, **row, "sample_id": content_id(*(row[name] for name in key))}


def with_video(row: dict[str, Any], store: VideoStore, data: bytes) -> dict[str, Any]:
    key = content_id("made-up video", row["sample_id"])
    store.write(key, data, {})
    return {**row, "video_key": key, "video_uri": store.uri(key)}


def save(run: Path, rows: Sequence[dict[str, Any]]) -> Folder:
    """The folder of the evaluation, in a run directory."""
    evaluation = Folder(run / "evaluation/e1")
    Table(evaluation.at("samples"), SAMPLE, "sample_id").append(list(rows))
    return evaluation
