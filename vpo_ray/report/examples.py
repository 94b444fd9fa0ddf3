"""Three queries of an evaluation, what each policy wrote for them and what came of it: as text for a
terminal, and as a picture with frames of the first and the last policy's videos."""

from __future__ import annotations

import io
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.files.folder import Folder
from vpo_ray.records import Row
from vpo_ray.report.evaluation_cards import ALIGNED, Key, PolicyPair, policy_values, sorting_metric
from vpo_ray.report.page import video_stores
from vpo_ray.storage.videos import VideoDamaged, VideoMissing

PICTURE = "examples.png"
FRAMES = 4  # of each video
HEIGHT, GAP = 96, 6  # pixels
LONGEST = 400  # characters of a text
MEDIAN = "in the middle"


@dataclass(frozen=True)
class ShownQuery:
    """A query, and the sample of each policy with its value of `metric`."""

    title: str
    metric: str
    query: str
    samples: list[tuple[Row, float]]


def pick_examples(results: Mapping[str, Any], samples: Iterable[Row]) -> list[ShownQuery]:
    """The query that gained most from the first policy to the last one, one in the middle, and the one that
    lost most or gained least: of the first set and video model. None where nothing is compared."""
    policies = list(results.get("order") or results["policies"])
    if len(policies) < 2 or not results["sets"] or not results["video_models"]:
        return []
    of_set, video_model = (next(iter(results[name])) for name in ("sets", "video_models"))
    group = PolicyPair(of_set, video_model, policies[0], policies[-1])
    metric = sorting_metric(results, group)
    rows: dict[str, dict[Key, Row]] = defaultdict(dict)
    for row in samples:
        if (row["set"], row["video_model"]) == group[:2]:
            rows[row["policy"]][row["query_id"], row["seed"]] = row
    better = results["higher_is_better"].get(metric)
    values = policy_values(rows, metric, better)
    sign = -1 if better is False else 1
    common = set.intersection(*(set(rows[policy]) for policy in policies))
    order = sorted(common, key=lambda key: (sign * (values[group.a, key] - values[group.b, key]), key))
    if len(order) < 3:
        return []
    chosen = {"gained most": order[0], MEDIAN: order[len(order) // 2], "gained least": order[-1]}
    return [
        ShownQuery(
            title, metric, rows[group.a][key]["query"], [(rows[p][key], values[p, key]) for p in policies]
        )
        for title, key in chosen.items()
    ]


def examples_text(examples: Sequence[ShownQuery], width: int) -> str:
    """What each policy wrote for these queries, wrapped to `width` columns."""
    return "".join(f"{line}\n" for example in examples for line in _lines(example, width))


def examples_picture(examples: Sequence[ShownQuery], folder: Folder) -> bytes | None:
    """A PNG with a row for each query: FRAMES frames of the first policy's video, and as many of the last
    one's. A video that is not there is left grey. None where there is none at all.

    Args:
        folder: of the evaluation.
    """
    from PIL import Image

    pairs = [[_frames(row, folder) for row, _ in (e.samples[0], e.samples[-1])] for e in examples]
    found = next((frames for pair in pairs for frames in pair if frames is not None), None)
    if found is None:
        return None
    width = max(1, round(HEIGHT * found.shape[2] / found.shape[1]))
    picture = Image.new("RGB", (2 * FRAMES * width + GAP, len(pairs) * (HEIGHT + GAP) - GAP), "white")
    for i, pair in enumerate(pairs):
        for side, frames in enumerate(pair):
            for j in range(FRAMES):
                place = ((side * FRAMES + j) * width + side * GAP, i * (HEIGHT + GAP))
                shown = (
                    Image.new("RGB", (1, 1), "lightgrey") if frames is None else Image.fromarray(frames[j])
                )
                picture.paste(shown.resize((width, HEIGHT), Image.Resampling.BICUBIC), place)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _lines(example: ShownQuery, width: int) -> Iterator[str]:
    def figure(row: Row, value: float) -> str:
        return row["verdict"] or "none" if example.metric == ALIGNED else f"{value:.2f}"

    # Who leaves the query as it is needs no line of its own.
    bare = [
        f"{row['policy']} {figure(row, v)}" for row, v in example.samples if row["prompt"] == example.query
    ]
    given = f" ({', '.join(bare)})" if bare else ""
    yield f"{example.title}, by {example.metric}: {_one_line(example.query)}{given}"
    name = max(len(row["policy"]) for row, _ in example.samples)
    for row, value in example.samples:
        if row["prompt"] == example.query:
            continue
        head = f"  {row['policy']:<{name}} {figure(row, value):>7}  "
        text = _one_line(row["prompt"] or row["error"] or row["skipped"] or "")
        yield from textwrap.wrap(
            text,
            max(width, len(head) + 20),
            initial_indent=head,
            subsequent_indent=" " * len(head),
        ) or [head.rstrip()]


def _one_line(text: str) -> str:
    """On one line without control characters, and cut where it is long."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def _frames(row: Row, folder: Folder) -> np.ndarray | None:
    """FRAMES frames at even distances, the first and the last among them: uint8 RGB (FRAMES, H, W, 3)."""
    if not row["video_key"]:
        return None
    for store in video_stores(folder, row):
        try:
            frames, _ = read_video(store.read(row["video_key"]))
        except (VideoMissing, VideoDamaged, RewardError):
            continue
        return frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    return None
