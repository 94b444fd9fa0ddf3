"""What a run made, by id and content hash, and how two runs differ in it."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from vpo_ray.loop.ledger import reconcile
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

# What a stage computes of a candidate. Places and seconds may differ between two runs.
COLUMNS = {
    "sample": ("query_id", "query", "k", "seed", "policy", "prompt", "finish_reason", "prompt_tokens",
               "completion_tokens"),
    "judge": ("verdict", "critique", "missing", "added", "refined_prompt", "refined_fault", "refined_verdict",
              "refined_critique", "refined_missing", "refined_added"),
    "render": ("video_key", "video_seed", "frames", "fps", "width", "height", "skipped"),
    "score": ("reward", "answers", "dimensions", "score", "error", "error_stage"),
    "pair": ("query_id", "query", "chosen", "rejected", "kind", "margin", "chosen_id", "rejected_id"),
}  # fmt: skip
TABLES = {
    "sample": "candidates",
    "judge": "verdicts",
    "render": "renders",
    "score": "feedback",
    "pair": "pairs",
}

# Mean difference of a pixel, of 255: rounding makes about one, another prompt at the same seed five.
LEVELS = 3.0

# By what it is of, the content hash of each id.
Made = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Difference:
    """Rows that are absent or have other content than in the undisturbed run, and rows that are
    stored twice or are in no undisturbed run; each as `table id`."""

    lost: tuple[str, ...]
    duplicated: tuple[str, ...]


def made(run: RunDir) -> Made:
    """Everything that a run computed: candidates with each stage's results, and pairs. Videos, which the
    rows name by content, are compared by `other_videos`."""
    found: Made = {}
    rows = list(run.table("feedback").rows())
    for stage, columns in COLUMNS.items():
        source = run.table("pairs").rows() if stage == "pair" else rows
        key = "pair_id" if stage == "pair" else "candidate_id"
        found[stage] = {row[key]: _hash({name: _sure(row[name]) for name in columns}) for row in source}
    return found


def other_videos(reference: RunDir, run: RunDir) -> list[str]:
    """Videos of the undisturbed run that the other has not, or has with other frames. Two processes do
    not add in the same order on every CPU, and the codec makes much of the last digit: frames may
    differ in some pixels, and not on average."""
    stores = [VideoStore(of.at("videos")) for of in (reference, run)]
    different = []
    for key in sorted({row["video_key"] for row in reference.table("feedback").rows()} - {None}):
        try:
            ours, theirs = (_frames(store.read(key)) for store in stores)
        except (VideoMissing, VideoDamaged):
            different.append(f"video {key}")
            continue
        if ours.shape != theirs.shape or np.abs(ours - theirs).mean() > LEVELS:
            different.append(f"video {key}")
    return different


def stored_twice(run: RunDir) -> list[str]:
    """Ids that more than one row of a table has."""
    twice = []
    for name in TABLES.values():
        table = run.table(name)
        keys = Counter(key for batch in table.batches([table.key]) for key in batch.column(0).to_pylist())
        twice += [f"{name} {key}" for key, count in keys.items() if count > 1]
    return twice


def difference(reference: Made, disturbed: Made, twice: Iterable[str] = ()) -> Difference:
    lost = [
        f"{what} {key}"
        for what, rows in reference.items()
        for key, content in rows.items()
        if disturbed.get(what, {}).get(key) != content
    ]
    more = [f"{what} {key}" for what, rows in disturbed.items() for key in rows if key not in reference[what]]
    return Difference(tuple(lost), (*more, *twice))


def unreconciled(run: RunDir) -> list[str]:
    """What the ledger that the run has written does not account for."""
    return reconcile(run.read_json("ledger.json"))


def curve(run: RunDir) -> dict[str, str]:
    """The steps of a training run by number; losses to six digits, for threads may sum in any order."""
    names = ("epoch", "loss", "lr", "rows", "tokens")
    return {
        str(line["step"]): _hash({name: float(f"{line[name]:.6g}") for name in names})
        for line in run.metrics("dpo")
    }


def steps_told_twice(run: RunDir) -> list[str]:
    steps = Counter(line["step"] for line in run.metrics("dpo"))
    return [f"step {step}" for step, count in steps.items() if count > 1]


def _frames(data: bytes) -> np.ndarray:
    """[frames, height, width, 3], 0 to 255."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(float)


def _sure(value: Any) -> Any:
    """A value without the answers' probabilities, whose seventh digit depends on what is in a batch."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in x.items() if k != "probability"} if isinstance(x, dict) else x for x in value]


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
