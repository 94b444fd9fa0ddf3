"""Rounds of adaptive rendering over stored tables: killed anywhere, they end at the same videos."""

import random
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import FEEDBACK, Row, failed
from vpo_ray.storage.id_sets import id_set, isin_sorted, union
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.adaptive_rounds import AdaptiveRounds

QUERIES, K = 6, 4
TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
BOTH = ["render", "score"]


@pytest.fixture
def recipe() -> Recipe:
    return load(TINY, ["render.strategy=adaptive"])


def judged(query: int, k: int) -> Row:
    """Some candidates are misaligned, some repeat a prompt, one has failed."""
    draw = random.Random(f"judge {query} {k}")
    row = dict.fromkeys(FEEDBACK.names)
    row |= {"candidate_id": f"{query:016}{k:016}", "query_id": f"q{query}", "query": f"query {query}"}
    row |= {"k": k, "seed": 1, "prompt": f"prompt {draw.randint(0, 5)}", "verdict": "aligned"}
    if draw.random() < 0.25:
        row["verdict"] = "imprecise"
    return failed(row, "judge", "no verdict") if draw.random() < 0.05 else row


def judged_run(folder: Path) -> RunDir:
    run = RunDir(folder)
    run.table("queries").append(
        [{"query_id": f"q{i}", "query": f"query {i}", "split": "dpo"} for i in range(QUERIES)]
    )
    rows = [judged(query, k) for query in range(QUERIES) for k in range(K)]
    run.table("candidates").append([row | {"verdict": None} for row in rows])
    run.table("verdicts").append(rows)
    return run


def rendered(row: Row, faults: bool) -> Row:
    """What the render stage makes of a row, by its content alone."""
    if row["verdict"] != "aligned" or row["error"] is not None or row["skipped"] is not None:
        return row
    if faults and random.Random(f"render {row['query_id']} {row['prompt']}").random() < 0.15:
        return failed(row, "render", "black frames")
    return row | {"video_key": f"{row['query_id']} {row['prompt']}"}


def scored(row: Row) -> Row:
    if row["video_key"] is None or row["error"] is not None:
        return row
    score = random.Random(f"score {row['video_key']}").choice([1.0, 1.0, 1.0, 2.0])
    return row | {"score": score, "answers": [], "dimensions": []}


class Killed(Exception):
    pass


def work(run: RunDir, recipe: Recipe, order: random.Random, retry: bool = False, faults: bool = True) -> int:
    """One call of the pipeline, which may be killed between any two writes; returns its renders."""

    def write(table: str, row: Row) -> None:
        if order.random() < 0.1:
            raise Killed
        run.table(table).append([row])

    rounds, count = AdaptiveRounds(recipe, run, BOTH, retry), 0
    while (enter := rounds.next()) is not None:
        finished = run.table("feedback").keys()
        waiting = [row for row in run.table("renders").rows() if row["candidate_id"] not in finished]
        chosen = {candidate.decode() for candidate in enter.tolist()}
        new = [row for row in run.table("verdicts").rows() if row["candidate_id"] in chosen]
        for row in order.sample(new, len(new)):
            done = rendered(row, faults)
            write("renders", done)
            count += done["video_key"] is not None
            waiting.append(done)
        for row in order.sample(waiting, len(waiting)):
            write("feedback", scored(row))
    return count


def state(run: RunDir) -> dict[str, Any]:
    rows = run.table("feedback").rows()
    return {row["candidate_id"]: (row["score"], row["skipped"], row["error"]) for row in rows}


class Steady(random.Random):
    """Never kills."""

    def random(self) -> float:
        return 0.9


def test_a_kill_anywhere_changes_no_video(tmp_path: Path, recipe: Recipe) -> None:
    whole = judged_run(tmp_path / "whole")
    work(whole, recipe, Steady(0))
    complete = state(whole)
    assert len(complete) == QUERIES * K
    assert {"not needed: the query has its pair"} < {skipped for _, skipped, _ in complete.values()}
    assert [p for p in reconcile(build_ledger(whole, recipe)) if not p.startswith("pair")] == []
    for seed in range(2):
        run, order, kills = judged_run(tmp_path / str(seed)), random.Random(seed), 0
        while True:
            try:
                work(run, recipe, order)
                break
            except Killed:
                kills += 1
        assert kills > 0
        assert state(run) == complete
        assert work(run, recipe, Steady(0)) == 0


def test_a_retry_ends_where_a_run_without_errors_does(tmp_path: Path, recipe: Recipe) -> None:
    clean, run = judged_run(tmp_path / "clean"), judged_run(tmp_path / "run")
    work(clean, recipe, Steady(0), faults=False)
    work(run, recipe, Steady(0), faults=True)
    broken = [row["query_id"] for row in run.table("feedback").rows() if row["error_stage"] == "render"]
    assert broken
    work(run, recipe, Steady(0), retry=True, faults=False)
    have = {row["query_id"]: row for row in run.table("feedback").rows() if row["error_stage"] == "render"}
    # What failed and is still not rendered belongs to queries that have their pair.
    scores: dict[str, set[float]] = {}
    for row in run.table("feedback").rows():
        scores.setdefault(row["query_id"], set()).add(row["score"])
    assert all({1.0, 2.0} <= scores[query] for query in have)
    assert len(have) < len(broken)


def test_a_query_that_is_not_judged_yet_waits(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir(tmp_path)
    run.table("verdicts").append([judged(0, k) for k in range(K - 1)])
    assert AdaptiveRounds(recipe, run, BOTH, False).next() is None


def test_rendering_alone_waits_for_scores(tmp_path: Path, recipe: Recipe) -> None:
    run = judged_run(tmp_path)
    first = AdaptiveRounds(recipe, run, ["render"], False).next()
    assert first is not None
    chosen = {candidate.decode() for candidate in first.tolist()}
    rows = [row for row in run.table("verdicts").rows() if row["candidate_id"] in chosen]
    run.table("renders").append([rendered(row, faults=False) for row in rows])
    assert AdaptiveRounds(recipe, run, ["render"], False).next() is None
    assert not run.table("feedback").count()


def test_sets_of_ids() -> None:
    some = id_set(["c", "a"])
    assert list(isin_sorted(id_set(["a", "b"]), some)) == [True, False]
    assert list(union(some, id_set(["b", "c"]))) == [b"a", b"b", b"c"]
    assert list(isin_sorted(some, id_set())) == [False, False]
