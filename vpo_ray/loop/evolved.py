"""What a run's `evolutions` amount to: its entry in the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vpo_ray.records import Row
from vpo_ray.stages.tally import by_reason, reason_of
from vpo_ray.storage.run_dir import EVOLUTION_ASKED, EVOLUTION_SCORED, RunDir
from vpo_ray.stream.spending import Charges

_COLUMNS = (
    "query_id", "round", "prompt", "verdict", "skipped", "video_key", "fitness", "target", "ended", "fault",
    "error", "error_stage",
)  # fmt: skip


def evolution_entry(run: RunDir, queries: int) -> dict[str, Any]:
    """Rows here are queries: one with an SFT target is out, one without is dropped, with the reason.

    Returns:
        The ledger's keys of a stage, and `rounds` asked for, `prompts` written, `verdicts` on them, why some
        are `not_rendered`, `failed` ones by reason, `videos`, the `gain` in fitness of targets over their
        query (mean), and why queries `ended`. `seconds` are of the rounds asked for.
    """
    counts = {name: Counter[str]() for name in ("dropped", "verdicts", "not_rendered", "failed", "ended")}
    own, best = dict[str, float](), dict[str, float]()
    seen = prompts = out = 0
    videos: set[str] = set()
    for row in run.table("evolutions").rows(_COLUMNS):
        _count(row, counts)
        videos.update([row["video_key"]] if row["video_key"] is not None else [])
        seen += row["round"] == 0
        prompts += row["round"] > 0 and row["prompt"] is not None
        out += bool(row["target"])
        if row["fitness"] is not None and (row["round"] == 0 or row["target"]):
            (best if row["target"] else own)[row["query_id"]] = row["fitness"]
    gains = [fitness - own[query] for query, fitness in best.items() if query in own]
    waiting = queries - seen
    return {
        "in": queries,
        "out": out,
        "dropped": by_reason(counts["dropped"]),
        "skipped": {"not evolved yet": waiting} if waiting else {},
        "errored": {},
        **_asked(run),
        "prompts": prompts,
        **{name: by_reason(counts[name]) for name in ("verdicts", "not_rendered", "failed", "ended")},
        "videos": len(videos),
        "gain": round(sum(gains) / len(gains), 4) if gains else None,
    }


def _count(row: Row, counts: dict[str, Counter[str]]) -> None:
    if row["round"] == 0:
        counts["dropped"].update([row["fault"]] if row["fault"] is not None else [])
        counts["ended"].update([row["ended"]] if row["ended"] is not None else [])
    elif row["verdict"] is not None:
        counts["verdicts"][row["verdict"]] += 1
    if row["skipped"] is not None:
        counts["not_rendered"][row["skipped"]] += 1
    if row["error"] is not None:
        counts["failed"][f"{row['error_stage']}: {reason_of(row['error'])}"] += 1


def _asked(run: RunDir) -> dict[str, Any]:
    """Rounds that the LLM was asked for, and what they took."""
    rounds = timed = 0
    seconds, usage = 0.0, Charges()
    asked = RunDir(run.at(EVOLUTION_ASKED))
    for row in asked.table("offspring").rows(["seconds", "usage"]):
        rounds += 1
        spent = (row["seconds"] or {}).get("evolve")
        seconds, timed = seconds + (spent or 0.0), timed + (spent is not None)
        usage.add_row(row, "evolve")
    return {
        "seconds": round(seconds, 3) if timed else None,
        "seconds_per_row": round(seconds / timed, 4) if timed else None,
        "rounds": rounds,
        **usage.shown(),
    }


def evolved_candidates(run: RunDir, columns: Sequence[str]) -> Iterator[list[Row]]:
    """The Feedback rows of a run's evolved prompts, by query: what DPO pairs may be drawn from. The query
    itself is none of them."""
    scored = RunDir(run.at(EVOLUTION_SCORED)).table("feedback")
    for rows in scored.groups("query_id", columns):
        yield [row for row in rows if row["k"] > 0]
