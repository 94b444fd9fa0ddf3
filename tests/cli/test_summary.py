"""The last screen of a run: text of users and models cannot move the cursor or hide a word."""

from pathlib import Path

import pytest

from vpo_ray.cli.summary import WIDTH, run_summary
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.recipe import load
from vpo_ray.storage.run_dir import RunDir

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
HOSTILE = (
    "clear\x1b[2J\x1b]0;title\x07 bell\x00 \x9b31m red \r overwrite \u202ereversed\u2066 \ufeff\u200b end"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.table("queries").append([{"query_id": "q", "query": "a cat", "split": "dpo"}])
    made.write_json("ledger.json", build_ledger(made, load(TINY)))
    return made


def test_the_funnel_and_where_to_look(run: RunDir) -> None:
    lines = run_summary(run).splitlines()
    assert lines[1] == "1 queries → 0 candidates → 0 aligned → 0 videos → 0 pairs"
    assert f"report   {run.uri}/report/index.html" in lines
    assert f"ledger   {run.uri}/ledger.json" in lines
    assert not any(line.startswith(("serve", "policy", "query")) for line in lines)


def test_what_a_video_pair_takes_is_told_for_both_strategies(run: RunDir) -> None:
    ledger = run.read_json("ledger.json")
    counts = {"all": {"videos": 24, "per_video_pair": 6.0}, "adaptive": {"videos": 20, "per_video_pair": 5.0}}
    ledger["stages"]["pair"] |= {"kinds": {"video": 4}, "videos": counts}
    run.write_json("ledger.json", ledger)
    told = "videos for a video pair, by render.strategy: 5.0 (adaptive), 6.0 (all)"
    assert told in run_summary(run).splitlines()


def test_what_was_spilled_is_told(run: RunDir) -> None:
    assert "object store" not in run_summary(run)
    ledger = run.read_json("ledger.json")
    run.write_json("ledger.json", ledger | {"last_run": {"spilled_bytes": 1_230_000_000}})
    assert "the object store spilled 1.23 GB to disk: see docs/operations.md" in run_summary(run).splitlines()


def test_what_took_time_is_told(run: RunDir) -> None:
    assert "\ntook " not in run_summary(run)
    ledger = run.read_json("ledger.json")
    phases = {"curate": 0.4, "sft": 90.1, "generate": 240.0, "pair": 0.2, "dpo": 61.3}
    run.write_json("ledger.json", ledger | {"last_run": {"phases": phases}})
    assert "took 7 min: generate 4 min, sft 90 s, dpo 61 s" in run_summary(run).splitlines()
    run.write_json("ledger.json", {**run.read_json("ledger.json"), "last_run": {"phases": {"sft": 0.2}}})
    assert "\ntook " not in run_summary(run), "it was all done"


@pytest.mark.parametrize(("made", "shown"), [(["sft"], "sft"), (["sft", "dpo"], "dpo"), (["dpo"], "dpo")])
def test_the_policy_to_serve_is_the_last_one_trained(run: RunDir, made: list[str], shown: str) -> None:
    for phase in made:
        run.write_json(f"checkpoints/{phase}/vpo.json", {})
    command = f"serve    vpo serve {run.uri}/checkpoints/{shown} --recipe {run.uri}/recipe.yaml"
    assert command in run_summary(run).splitlines()
    assert run_summary(run).count("serve    ") == 1


def test_the_example_begins_with_its_query_and_takes_few_lines_where_that_is_asked(run: RunDir) -> None:
    run.write_json("example.json", {"query": "a cat", "sft": "wide shot " * 40, "dpo": "close up " * 40})
    text = run_summary(run)
    assert text.index("query    a cat") < text.index("sft      wide") < text.index("dpo      close")
    short = run_summary(run, most=1).splitlines()
    [line] = [line for line in short if "wide shot" in line]
    assert line.endswith(" …")
    assert len(line) <= WIDTH


def test_control_characters_never_reach_the_terminal(run: RunDir) -> None:
    run.write_json("example.json", {"query": HOSTILE, "sft": HOSTILE, "dpo": HOSTILE})
    text = run_summary(run)
    assert all(char == "\n" or char.isprintable() for char in text)
    assert "overwrite" in text
    assert text.count("end\n") == 3


def test_long_and_empty_texts(run: RunDir) -> None:
    run.write_json("example.json", {"query": "", "sft": "word " * 100, "dpo": "x" * 300})
    lines = run_summary(run).splitlines()
    assert all(len(line) <= WIDTH for line in lines if not line.startswith(("report", "ledger")))
    assert sum(line.count("word") for line in lines) == 100
    assert sum(line.startswith(("query ", "sft ", "dpo ")) for line in lines) == 3


def test_one_score_for_all_videos_is_told(run: RunDir) -> None:
    ledger = run.read_json("ledger.json")
    score = ledger["stages"]["score"]
    for low, high, told in ((0.5, 0.5, True), (0.5, 0.6, False)):
        score |= {"in": 20, "out": 20, "score": {"mean": 0.5, "min": low, "max": high}}
        run.write_json("ledger.json", ledger)
        assert ("warning: all 20 videos got the score 0.5" in run_summary(run)) == told
