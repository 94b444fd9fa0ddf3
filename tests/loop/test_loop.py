"""The loop with real engines on tiny weights: real queries in, pairs out; killed and run again.

Everything runs as a user runs it, `vpo run` in a process of its own with its own Ray.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_table_folders import check_tables

from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

SHARED = Path(__file__).parents[3] / "shared/data/vpo/sft_prompts.json"
SHIPPED = Path(__file__).parents[2] / "vpo_ray/data/queries.jsonl"


def picked(count: int = 40) -> list[str]:
    """Real queries by a fixed rule: the first few of each awkward kind, then evenly spaced ones."""
    if SHARED.exists():
        everything = json.loads(SHARED.read_text("utf-8"))
    else:
        everything = [json.loads(line)["query"] for line in SHIPPED.read_text("utf-8").splitlines()]
    kinds: list[Callable[[str], bool]] = [
        lambda q: "\n" in q.strip(),
        lambda q: not q.isascii(),
        lambda q: "-neg" in q,
        lambda q: len(q.split()) == 1,
        lambda q: len(q.split()) > 150,
    ]
    chosen = [query for kind in kinds for query in list(filter(kind, everything))[:5]]
    step = max(1, len(everything) // (count - len(chosen)))
    return list(dict.fromkeys(chosen + everything[::step]))[:count]


def command(tiny_sets: list[str], queries: Path, out: Path) -> list[str]:
    recipe = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
    values = {
        "queries.path": queries,
        "queries.splits": "{dpo: 1}",
        "sample.k": 2,
        "sft": "null",
        "dpo": "null",
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [
        sys.executable,
        "-m",
        "vpo_ray.cli",
        "run",
        str(recipe),
        "--out",
        str(out),
        *tiny_sets,
        *sets,
    ]


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.json"
    path.write_text(json.dumps(picked()), "utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny_sets: list[str], queries: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = subprocess.run(command(tiny_sets, queries, out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    foreign = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d [IW] ", line)]
    assert foreign == [], "a user sees lines of ours only"
    return RunDir(out)


def made(run: RunDir) -> dict[str, object]:
    """What a run computed, without what may differ between two runs (seconds, places)."""
    rows = {row["candidate_id"]: row for row in run.table("feedback").rows()}
    return {
        "candidates": {key: (row["query"], row["k"], row["prompt"]) for key, row in rows.items()},
        "verdicts": {key: (row["verdict"], row["refined_prompt"]) for key, row in rows.items()},
        "videos": {row["video_key"] for row in rows.values() if row["video_key"]},
        "pairs": run.table("pairs").keys(),
    }


def test_every_real_query_ends_in_a_row_or_a_counted_reason(undisturbed: RunDir, queries: Path) -> None:
    given = json.loads(queries.read_text("utf-8"))
    kept = list(undisturbed.table("queries").rows())
    dropped = list(undisturbed.table("dropped").rows())
    assert len(kept) + len(dropped) == len(given)
    assert all(row["reason"] for row in dropped)
    feedback = list(undisturbed.table("feedback").rows())
    assert len(feedback) == 2 * len(kept)
    for row in feedback:
        assert row["error"] or row["verdict"]
        assert row["verdict"] != "aligned" or row["error"] or row["score"] is not None
    errors = [row["error"] for row in feedback if row["error"]]
    assert len(errors) <= len(feedback) / 4, errors[:5]
    assert any(row["refined_prompt"] for row in feedback)
    ledger = undisturbed.read_json("ledger.json")
    from vpo_ray.loop.ledger import reconcile

    assert reconcile(ledger) == []
    assert ledger["stages"]["pair"]["pairs"] == undisturbed.table("pairs").count() > 0


def test_other_readers_of_parquet_open_its_tables(undisturbed: RunDir) -> None:
    assert check_tables(undisturbed) >= {"queries", "feedback", "pairs"}


def test_videos_of_a_query_share_a_seed_and_lie_in_the_store(undisturbed: RunDir) -> None:
    seeds: dict[str, set[int]] = {}
    rendered = [row for row in undisturbed.table("feedback").rows() if row["video_key"]]
    assert rendered
    for row in rendered:
        seeds.setdefault(row["query_id"], set()).add(row["video_seed"])
        assert Path(row["video_uri"].removeprefix("file://")).stat().st_size > 100
    assert all(len(found) == 1 for found in seeds.values())


def test_a_driver_killed_twice_gives_what_an_undisturbed_run_gives(
    tiny_sets: list[str], queries: Path, undisturbed: RunDir, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "killed")
    start = command(tiny_sets, queries, tmp_path / "killed")
    # Once terminated between the first candidates and their verdicts, as a scheduler stops a job, and
    # once killed in the middle of the videos.
    for table, parts, number in (("candidates", 2, signal.SIGTERM), ("feedback", 3, signal.SIGKILL)):
        with open(tmp_path / f"{table}.log", "wb") as log:
            driver = subprocess.Popen(start, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 400
            while len(run.table(table).parts()) < parts and driver.poll() is None:
                assert time.monotonic() < deadline, f"no {table} in time"
                time.sleep(0.2)
            driver.send_signal(number)
            status = driver.wait(timeout=60)
        finally:
            driver.kill()
            driver.wait(timeout=30)
        if number == signal.SIGTERM:
            assert status == 143, (tmp_path / f"{table}.log").read_text("utf-8")[-4000:]
            assert run.read_json("ledger.json")["stages"]["sample"]["out"] > 0
    done = subprocess.run(start, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert made(run) == made(undisturbed)
    rows = [row["candidate_id"] for batch in run.table("feedback").batches() for row in batch.to_pylist()]
    assert len(rows) == len(set(rows)), "no candidate is stored twice"
