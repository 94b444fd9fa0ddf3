"""Videos that evolution takes for an SFT target, against upstream's loop, in the small world.

    python benchmarks/evolution.py

Both go through the package's rules for a round, with the world's video model and its detector as the reward
(truth: the share of what a query names that a clip shows, one whole thing and a clear look). Upstream's loop
(Prompt-A-Video, booster/finetuning/gpt_boost.py) renders all of 3 prompts in each of 8 rounds, every video
with noise of its own. Ours is that of `evolve`: the judge looks first, repeated prompts are not rendered, all
prompts of a query share a seed, and `patience` rounds without a better prompt are the end.

The writer is no LLM. It keeps what the best prompt says and changes some of it, loses a word of the query in
one prompt of 7 and repeats a prompt in one of 10, and is the same for both. The worth of a target is its
truth with seeds that no evolution saw. The last line is one JSON object: videos a query and worth of both;
for each patience the ratio of videos, and the difference of worth with its standard error; and what
upstream's loop is worth after fewer rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Evolve
from vpo_ray.records import Row, query_id, seed_of
from vpo_ray.stages.evolution import (
    candidate_row,
    entries_of,
    next_ask,
    target_of,
    videos_of,
    waits,
    why_ended,
)
from vpo_ray.stages.evolve import why_skipped
from vpo_ray.world import lexicon
from vpo_ray.world.language import Query, caption, complete, query
from vpo_ray.world.make import WEIGHTS
from vpo_ray.world.scene import NAMED, scenes
from vpo_ray.world.train_video import render_settings
from vpo_ray.world.truth import truth

LOSES, REPEATS, CHANGES = 1 / 7, 1 / 10, 0.3
WORD_LIMIT = 60


@dataclass(frozen=True)
class Way:
    """How prompts evolve. careful: judged and compared before they are rendered, all with one seed."""

    name: str
    settings: Evolve
    careful: bool


# Its fitness is over rewards that the world does not have; both take the truth.
UPSTREAM = Way("upstream", Evolve.model_validate({"preset": "prompt_a_video", "fitness": {}}), careful=False)


def ours(patience: int) -> Way:
    return Way("ours", Evolve.model_validate({"patience": patience}), careful=True)


class World:
    """Truth of prompts, by the world's video model."""

    def __init__(self) -> None:
        self.engine = VideoEngine(render_settings(WEIGHTS / "video", batch_size=4))
        self.known: dict[tuple[str, int], float] = {}
        self.videos = 0

    def truths(self, asked: Query, prompts: Sequence[str], seeds: Sequence[int]) -> list[float]:
        """Of a video of each prompt with its seed; a video that is known is not made again."""
        keys = list(zip(prompts, seeds, strict=True))
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        if new:
            self.videos += len(new)
            for key, clip in zip(new, self.engine.render(*map(list, zip(*new, strict=True))), strict=True):
                if isinstance(clip, Exception):
                    raise clip
                self.known[key] = truth(asked.named, clip)
        return [self.known[key] for key in keys]


def evolve(asked: Query, way: Way, world: World, seed: int) -> list[Row]:
    """The entries of a query when its evolution has ended."""
    own = {"query_id": query_id(asked.text), "query": asked.text, "unsafe": False}
    rng, asks, results = np.random.default_rng(seed), list[Row](), dict[str, Row]()
    while True:
        entries = entries_of(own, asks, results, way.settings)
        if due := [entry for entry in entries if waits(entry)]:
            results |= look(asked, due, way, world, seed)
            continue
        if why_ended(entries, way.settings) is not None:
            return entries
        ask = next_ask(entries, way.settings, "writer", seed)
        texts = [write(asked, ask, rng) for _ in range(ask["wanted"])]
        reasons: list[str | None] = [None] * len(texts)
        if way.careful:
            reasons = why_skipped(texts, ask["known"], WORD_LIMIT, way.settings.near_duplicates)
        written = [{"prompt": text, "skipped": why} for text, why in zip(texts, reasons, strict=True)]
        asks.append({**ask, "written": written, "error": None, "error_stage": None})


def look(asked: Query, due: Sequence[Row], way: Way, world: World, seed: int) -> dict[str, Row]:
    """Results by prompt: judged, where the way is careful, then rendered and scored."""
    rows = {}
    for entry in due:
        judged = way.careful and entry["round"] > 0
        row = {**candidate_row(entry), "critique": None, "video_key": None, "video_uri": None, "score": None}
        row |= {"skipped": None, "error": None, "error_stage": None, "dimensions": [], "more_rewards": []}
        row["verdict"] = lexicon.verdict(asked.text, entry["prompt"]) if judged else "aligned"
        row["video_seed"] = seed_of("video", seed, "" if way.careful else entry["prompt_id"]) % 2**31
        rows[entry["prompt_id"]] = row
    passed = [row for row in rows.values() if row["verdict"] == "aligned"]
    scores = world.truths(asked, [row["prompt"] for row in passed], [row["video_seed"] for row in passed])
    for row, score in zip(passed, scores, strict=True):
        row |= {"score": score, "video_key": row["candidate_id"]}
    return rows


def write(asked: Query, ask: Row, rng: np.random.Generator) -> str:
    """A new prompt, of the best that is shown."""
    best: str = max(ask["shown"], key=lambda entry: float(entry["fitness"]))["prompt"]
    if rng.random() < REPEATS:
        return best
    said = {name: value for name, value in lexicon.read(best).items() if rng.random() > CHANGES}
    wants: dict[str, Any] = {**said, **asked.named}
    if rng.random() < LOSES:
        del wants[str(rng.choice(list(asked.named)))]
    sight = wants.get("look") or str(rng.choice(["clear", "faded", "unsaid"]))
    scene = complete(
        {n: wants[n] for n in NAMED if wants.get(n)}, rng, "faded" if sight == "faded" else "clear"
    )
    return caption(scene, rng, look=sight != "unsaid")


def target(entries: Sequence[Row], settings: Evolve) -> str:
    """What SFT would learn; the query where there is nothing better."""
    best, _ = target_of(entries, settings)
    prompt: str = entries[0]["prompt"] if best is None else best["prompt"]
    return prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4, help="fresh ones, of a target's worth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=int, nargs="+", default=[2, 3, 4])
    given = parser.parse_args()
    began, world, rng = time.monotonic(), World(), np.random.default_rng(given.seed)
    possible = scenes(held_out=True)
    videos, worths = list[list[int]](), list[list[float]]()
    upstream = list[list[float]]()
    for number in range(given.queries):
        asked = query(possible[int(rng.integers(len(possible)))], rng, unsafe=0)
        fresh = [seed_of("fresh", given.seed, number, again) % 2**31 for again in range(given.seeds)]

        def worth(prompt: str, asked: Query = asked, fresh: list[int] = fresh) -> float:
            return float(np.mean(world.truths(asked, [prompt] * len(fresh), fresh)))

        seed = given.seed * 1000 + number
        ways = [ours(patience) for patience in given.patience]
        found = [evolve(asked, way, world, seed) for way in ways]
        videos.append([videos_of(entries) for entries in found])
        worths.append([worth(target(*both)) for both in zip(found, (w.settings for w in ways), strict=True)])
        whole = evolve(asked, UPSTREAM, world, seed)
        rounds = range(UPSTREAM.settings.rounds + 1)
        so_far = [[entry for entry in whole if entry["round"] <= last] for last in rounds]
        upstream.append([worth(target(entries, UPSTREAM.settings)) for entries in so_far])
        print(asked.text, videos[-1], worths[-1], upstream[-1][-1], flush=True)  # noqa: T201
    curve = dict(zip((1 + 3 * last for last in rounds), np.mean(upstream, axis=0).tolist(), strict=True))
    result = {
        "queries": given.queries,
        "upstream": {"videos": max(curve), "worth": round(curve[max(curve)], 3)},
        "ours": {
            patience: compared(np.array(videos)[:, n], np.array(worths)[:, n], np.array(upstream)[:, -1])
            for n, patience in enumerate(given.patience)
        },
        "upstream_by_videos": {count: round(value, 3) for count, value in curve.items()},
        "rendered": world.videos,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))  # noqa: T201


def compared(videos: np.ndarray, worths: np.ndarray, upstream: np.ndarray) -> dict[str, float]:
    """Figures over queries, [queries] each: ours and the worth of all of upstream's loop."""
    gap = worths - upstream
    found = {
        "videos": videos.mean(),
        "ratio": videos.mean() / UPSTREAM.settings.most_videos,
        "worth": worths.mean(),
        "less_upstream": gap.mean(),
        "error": gap.std(ddof=1) / len(gap) ** 0.5,
    }
    return {name: round(float(value), 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
