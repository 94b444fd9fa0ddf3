"""What previews save, and how far they agree with full renders, in the small world.

    vpo world runs/world
    python benchmarks/preview.py

The world's video model renders the prompts of `--queries` queries, `--k` each, in full (9 frames of 64 x 64,
with each of the `--full` steps: 6 are those of the laptop's recipe, 50 are what CogVideoX's authors
recommend) and as previews (each of `--looks`); the world's reward scores all of them. The package's own rules
then say who is rendered in full, which pairs there are, and how far previews agree (`stages/preview.py`).
Prompts are those of a writer who knows captions but not that the look matters (`world.language.teach`), 25 to
45 words.

Seconds are of the processor, on one thread, so that other programs beside it change them little. A pair costs
the render seconds of all queries over the number of video pairs, at most one a query; a query's pair is its
best, over the recipe's margin. `all` and `adaptive` are what `render.strategy` takes for them. `ratio` is of
previews to `all`, without the probe, whose cost does not grow with the queries; `ratio_24` has it, with 24
queries, and `ratio_1000` with 1,000. `margin_of_best` is the margin of the pairs that previews, and adaptive
rendering, find, over that of the best pairs. A render costs `decoding_s` whatever its steps are, and `step_s`
for each: by the first and the last of `--full`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vpo_ray.engines.reward import RewardModel, Scored, build
from vpo_ray.engines.video.engine import VideoEngine, encode
from vpo_ray.recipe import Pair, Preview, Recipe, Render, parse
from vpo_ray.records import FEEDBACK, Row, query_id, seed_of
from vpo_ray.stages.adaptive import videos_by_strategy
from vpo_ray.stages.pair import pairs_of_query
from vpo_ray.stages.preview import decide_by_previews, probe_figures
from vpo_ray.world.language import complete, query, teach

RECIPE = "jobs/recipes/laptop.yaml"
LOOKS = ["{steps: 2}", "{steps: 4}"]
COLUMNS = ("candidate_id", "query_id", "query", "k", "prompt", "verdict")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", default="runs/world")
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--full", nargs="+", type=int, default=[6, 50], help="steps of full renders")
    parser.add_argument("--looks", nargs="+", default=LOOKS, help="keys of render.preview, as YAML")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = parse(yaml.safe_load(Path(RECIPE).read_text("utf-8").replace("runs/world", given.world)), RECIPE)
    rows = candidates(given.queries, given.k, given.seed)
    reward = build(recipe.reward)
    previews = {text: Preview.model_validate(yaml.safe_load(text)) for text in given.looks}
    looks = {
        text: watch(recipe.render.model_copy(update=preview.looks()), rows, reward, given.seed)
        for text, preview in previews.items()
    }
    found: dict[str, Any] = {"queries": given.queries, "k": given.k}
    found["previews"] = {text: seen.seconds() for text, seen in looks.items()}
    say(found)
    costs = []
    for steps in given.full:
        full = watch(recipe.render.model_copy(update={"steps": steps}), rows, reward, given.seed)
        costs.append((steps, full.render_s))
        found[f"{steps} steps"] = {"full": full.seconds()} | {
            f"{text}, k {k}, keep {keep}": compared(
                full, looks[text], k, preview.model_copy(update={"keep": keep}), recipe
            )
            for text, preview in previews.items()
            for k in sorted({4, given.k})
            for keep in (2, 3)
        }
        say({f"{steps} steps": found[f"{steps} steps"]})
    (few, a), (many, b) = costs[0], costs[-1]
    if few != many:
        step_s = (b - a) / (many - few)
        found |= {"step_s": round(step_s, 4), "decoding_s": round(a - few * step_s, 4)}
    say(found)


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


def candidates(queries: int, k: int, seed: int) -> list[Row]:
    """Judged candidates, as the stage before rendering leaves them."""
    rng, rows, seen = np.random.default_rng(seed), list[Row](), set[str]()
    while len(seen) < queries:
        asked = query(complete({}, rng), rng, unsafe=0)
        if asked.text in seen:
            continue
        seen.add(asked.text)
        for number in range(k):
            row = dict.fromkeys(FEEDBACK.names)
            name = query_id(asked.text)
            values = (f"{name}-{number}", name, asked.text, number, teach(asked, rng), "aligned")
            rows.append(row | dict(zip(COLUMNS, values, strict=True)))
    return rows


class Watched:
    """Rows with their scores, by one kind of videos, and the seconds of each on average."""

    def __init__(self, rows: list[Row], render_s: float, score_s: float) -> None:
        self.rows, self.render_s, self.score_s = rows, render_s, score_s

    def seconds(self) -> dict[str, float]:
        return {"render_s": round(self.render_s, 4), "score_s": round(self.score_s, 4)}

    def by_query(self, k: int) -> list[list[Row]]:
        """The rows of each query, with its first k candidates."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["k"] < k:
                grouped.setdefault(row["query_id"], []).append(row)
        return list(grouped.values())


def watch(settings: Render, rows: Sequence[Row], reward: RewardModel, seed: int) -> Watched:
    """Render and score candidates, one by one."""
    engine = VideoEngine(settings)
    engine.warm_up()
    render_s = score_s = 0.0
    done = []
    for row in rows:
        began = time.process_time()
        (clip,) = engine.render([row["prompt"]], [seed_of("video", seed, row["query_id"])])
        render_s += time.process_time() - began
        if isinstance(clip, Exception):
            raise clip
        video = encode(clip, settings.fps, settings.crf)
        began = time.process_time()
        (result,) = reward.score([video], [row["query"]])
        score_s += time.process_time() - began
        if not isinstance(result, Scored):
            raise result
        more = {"video_key": "a video", "score": result.score, "answers": [], "dimensions": []}
        done.append({**row, **more})
    return Watched(done, render_s / len(rows), score_s / len(rows))


def compared(full: Watched, looks: Watched, k: int, settings: Preview, recipe: Recipe) -> dict[str, Any]:
    """Agreement, and what a pair costs each way."""
    pair: Pair = recipe.pair
    rendered = previewed = pairs = kept = adaptive = 0
    margins: list[list[float]] = []
    probe = []
    for rows, seen in zip(full.by_query(k), looks.by_query(k), strict=True):
        previews = {row["candidate_id"]: row for row in seen}
        probe.append((previews, rows))
        decisions = decide_by_previews(rows, previews, settings, pair)
        chosen = [row for row in rows if decisions[row["candidate_id"]] is None]
        prompts = videos_by_strategy(rows, pair)
        first = rows[: prompts["adaptive"]]
        best, found, early = (pairs_of_query(part, pair, Counter()) for part in (rows, chosen, first))
        pairs, kept = pairs + len(best), kept + len(found)
        if best:
            margins.append([part[0]["margin"] if part else 0.0 for part in (best, found, early)])
        rendered, previewed = rendered + len(chosen), previewed + prompts["all"]
        adaptive += prompts["adaptive"]
    queries = len(probe)
    figures = probe_figures(probe, settings, pair)
    of_all = previewed * full.render_s / pairs
    previews_s = previewed * looks.render_s + rendered * full.render_s
    whole_s = previewed * (looks.render_s + looks.score_s) + rendered * (full.render_s + full.score_s)
    # A query of the probe is rendered whole beside its previews.
    probe_s = settings.probe * (previewed - rendered) / queries * full.render_s
    share = {
        count: (previews_s * count / queries + probe_s) / (kept * count / queries) for count in (24, 1000)
    }
    best_margin, found_margin, early_margin = np.array(margins).mean(axis=0)
    return {
        **{name: figures[name] for name in ("agreement", "low", "high", "pairs", "ties")},
        "video_pairs": [kept, pairs],
        "render_s_a_pair": {
            "all": round(of_all, 3),
            "adaptive": round(adaptive * full.render_s / pairs, 3),
            "preview": round(previews_s / kept, 3),
        },
        "ratio": round(previews_s / kept / of_all, 3),
        "ratio_24": round(share[24] / of_all, 3),
        "ratio_1000": round(share[1000] / of_all, 3),
        "ratio_with_scoring": round(whole_s / kept / (previewed * (full.render_s + full.score_s) / pairs), 3),
        "margin_of_best": {
            "preview": round(float(found_margin / best_margin), 3),
            "adaptive": round(float(early_margin / best_margin), 3),
        },
    }


if __name__ == "__main__":
    main()
