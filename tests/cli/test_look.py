"""`vpo status`, `runs` and `logs` say what a run's directory says, wherever it is."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray.records import FEEDBACK
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.run_state import note, working


def candidate(number: int, **facts: Any) -> dict[str, Any]:
    ids = {"candidate_id": f"{number:02d}cafe", "query_id": "q", "query": "a cat", "k": number, "seed": 1}
    return {**dict.fromkeys(FEEDBACK.names), **ids, **facts}


def a_run(folder: Path) -> RunDir:
    run = RunDir(folder)
    run.write_json("versions.json", {})
    failed = {"error": "RuntimeError: out\x1b[31m of memory", "error_stage": "render"}
    run.table("verdicts").append([candidate(1), candidate(2)])
    run.table("feedback").append([candidate(1, score=0.5), candidate(2, **failed)])
    run.write("logs/render-0123.log", b"CUDA out of memory\n")
    return run


def vpo(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(list(words))
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_status_of_a_run_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run has said anything" in vpo(capsys, "status", "--out", str(tmp_path))[1]
    run, view = (
        a_run(tmp_path / "one"),
        {"what": "sft", "doing": None, "step": 2, "steps": 9, "elapsed_s": 1.0},
    )
    a_run(tmp_path / "other")
    with working(run):
        note(run, doing="sft", view={**view, "loss": 1.5, "tokens_s": None, "left_s": 70.0})
        said = vpo(capsys, "status", "--out", str(tmp_path))[1]
    assert said.startswith(f"{run.uri}: running in sft, 0 s (")
    assert said.endswith("  sft: step 2 of 9, loss 1.500; 70 s left\n")
    assert ": done, 0 s" in vpo(capsys, "status", "--out", run.uri)[1]
    assert vpo(capsys, "status", run.uri) == vpo(capsys, "status", "--out", run.uri)
    status, said = vpo(capsys, "status", run.uri, "--out", str(tmp_path))
    assert (status, "give one folder" in said) == (2, True)


def test_a_later_command_with_nothing_to_do_hides_no_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "one")
    view = {"what": "sft", "doing": None, "step": 9, "steps": 9, "elapsed_s": 700.0}
    with working(run):
        note(run, view={**view, "loss": 1.5, "tokens_s": None, "left_s": 0.0})
    state = run.read_json("meta/state.json")
    # It worked for 700 s, was begun again and killed 60 s later, and then there was nothing to do.
    run.write_json("meta/state.json", {**state, "worked_s": 700.0})
    with working(run):
        pass
    state = run.read_json("meta/state.json")
    assert 700 <= state["worked_s"] < 710
    run.write_json("meta/state.json", {**state, "state": "running", "began": state["updated"] - 60})
    with working(run):
        pass
    assert 760 <= run.read_json("meta/state.json")["worked_s"] < 770
    assert ": done, 13 min" in (said := vpo(capsys, "status", run.uri)[1])
    assert "sft: step 9 of 9" in said


@pytest.mark.parametrize("command", ["status", "runs", "logs"])
def test_a_folder_that_is_not_there_is_no_folder_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    status, said = vpo(capsys, command, str(tmp_path / "typo"))
    assert (status, f"there is no folder {tmp_path / 'typo'}" in said) == (2, True)
    monkeypatch.chdir(tmp_path)
    assert vpo(capsys, command)[0] == (1 if command == "logs" else 0), "nothing ran here yet"


def test_the_runs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpo(capsys, "runs", str(tmp_path)) == (0, f"{tmp_path}: no run is here\n")
    run = a_run(tmp_path / "one")
    (tmp_path / "no run").mkdir()
    stages = {
        "curate": {"splits": {"dpo": 6}},
        "sample": {"out": 24},
        "judge": {"verdicts": {"aligned": 5}},
        "render": {"videos": 4},
        "pair": {"pairs": 3},
    }
    run.write_json("ledger.json", {"stages": stages, "paid": {"cost": 1.234}})
    values = {"query": {"reward.mean": {"value": 0.3}}, "dpo": {"reward.mean": {"value": 0.89}}}
    results = {"id": "ab12", "order": ["query", "dpo"], "results": {"eval": {"render": values}}}
    run.write_json("evaluation/ab12/results.json", results)
    run.write_json("evaluation.json", {"id": "ab12", "results": "evaluation/ab12/results.json"})
    with working(run):
        pass
    head, line = vpo(capsys, "runs", str(tmp_path))[1].splitlines()
    assert head.split()[:2] == ["run", "state"]
    assert line.split("  ")[0] == run.uri
    for part in ("done", "6 → 24 → 5 → 4 → 3", "1.23", "reward.mean: query 0.300, dpo 0.890"):
        assert part in line
    (found,) = json.loads(vpo(capsys, "runs", str(tmp_path), "--json")[1])
    assert found["evaluation"] == {
        "id": "ab12", "measure": "reward.mean", "values": {"query": 0.3, "dpo": 0.89},
    }  # fmt: skip
    assert (found["states"], found["paid"], found["funnel"]["pairs"]) == ({"done": 1}, 1.234, 3)
    (said,) = json.loads(vpo(capsys, "status", "--out", run.uri, "--json")[1])
    assert (said["run"], said["state"]) == (run.uri, "done")


@pytest.mark.parametrize("name", ["ledger.json", "meta/state.json", "evaluation.json"])
def test_a_run_that_cannot_be_read_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole, damaged = a_run(tmp_path / "whole"), a_run(tmp_path / "damaged")
    for run in (whole, damaged):
        with working(run):
            pass
    damaged.write(name, b"{")
    for command in ("runs", "status"):
        status, said = vpo(capsys, command, str(tmp_path))
        if command == "runs" or name == "meta/state.json":
            assert (status, f"{damaged.uri} cannot be read" in said) == (1, True)
        assert whole.uri in said or command == "status", "which tells of the newest where none runs"


def test_the_logs_tell_of_rounds_and_evaluations_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.write_json("versions.json", {})
    a_run(tmp_path / "rounds/2")
    a_run(tmp_path / "evaluation/videos-ab")
    said = vpo(capsys, "logs", run.uri)[1]
    for place in ("rounds/2", "evaluation/videos-ab"):
        assert f"{place}: render: 1 rows: RuntimeError" in said
        assert f"{run.at(place)}/logs/render-0123.log" in said
    assert "nothing failed" not in said
    assert vpo(capsys, "logs", run.uri, "--row", "02")[1].count("feedback 02cafe") == 2


def test_the_logs_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    status, said = vpo(capsys, "logs", run.uri)
    assert status == 0
    assert "render: 1 rows: RuntimeError: out [31m of memory\n" in said
    assert f"{run.at('logs/render-0123.log')}\n  CUDA out of memory\n" in said
    assert vpo(capsys, "logs", run.uri, "--stage", "sample")[1] == f"{run.uri}: nothing failed in sample\n"
    status, said = vpo(capsys, "logs", run.uri, "--row", "02")
    assert said.startswith("feedback 02cafe\n")
    assert "error_stage    render" in said
    status, said = vpo(capsys, "logs", run.uri, "--row", "zz")
    assert (status, "no row whose id begins with 'zz'" in said) == (2, True)
    with working(run), socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        note(run, cluster={"address": f"127.0.0.1:{closed.getsockname()[1]}", "job": "01000000"})
        said = vpo(capsys, "logs", run.uri)[1]
    assert "living processes: no cluster answers at 127.0.0.1:" in said
    assert "living processes" not in vpo(capsys, "logs", run.uri)[1]
    a_run(tmp_path / "runs" / "one")
    assert vpo(capsys, "logs", str(tmp_path / "runs"))[0] == 0
    a_run(tmp_path / "runs" / "two")
    status, said = vpo(capsys, "logs", str(tmp_path / "runs"))
    assert (status, "holds 2 runs, name one: " in said) == (1, True)
    (tmp_path / "empty").mkdir()
    status, said = vpo(capsys, "logs", str(tmp_path / "empty"))
    assert (status, "is no run directory" in said) == (1, True)
