"""The doctor names what is wrong with a node, and finds a good one good."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, failure
from s3_server import bucket

from vpo_ray.cli import doctor, main
from vpo_ray.files.folder import Folder
from vpo_ray.recipe import load

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
NODE = {
    "NodeID": "ab" * 16,
    "NodeManagerHostname": "worker-1",
    "NodeManagerAddress": "10.0.0.1",
    "Resources": {"CPU": 4.0, "object_store_memory": 2.0**30},
}


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return doctor.probe(doctor.Ask({}, {}, ())) | {"disk_used": 0.5, "shared_memory": 2**31, "gpus": []}


def wrong(node: dict[str, Any], answer: Any, here: dict[str, Any], skew: float = 0) -> list[str]:
    found = doctor.node_findings(node, answer, skew, here)
    assert all(finding.fix for finding in found if not finding.ok)
    assert all("worker-1" in finding.where for finding in found)
    return [f"{finding.check}: {finding.found}" for finding in found if not finding.ok]


def test_a_good_node_has_no_problem(good: dict[str, Any]) -> None:
    assert wrong(NODE, good, good) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"versions": {"ray": "2.9"}}, "versions: ray 2.9, the driver has"),
        ({"disk_used": 0.96}, "disk of /tmp: 96% used"),
        ({"shared_memory": 2**26}, "object store: 1.0 GiB, /dev/shm 0.1 GiB"),
        ({"unreadable": {"judge.model": "/models/x: Permission denied"}}, "reads judge.model: /models/x"),
        ({"unwritable": {"out": "s3://b: access denied"}}, "writes out: s3://b"),
        ({"absent": ["OPENAI_API_KEY"]}, "variable OPENAI_API_KEY: not set"),
        ({"plugins": {"reward.kind": "m:B has version 2 here, and not 1"}}, "reward.kind: m:B has version 2"),
        (
            {"unreachable": {"render.endpoint.base_url": "http://x: refused"}},
            "reaches render.endpoint.base_url",
        ),
    ],
)
def test_each_problem_is_named(good: dict[str, Any], change: dict[str, Any], told: str) -> None:
    versions = good["versions"] | change.get("versions", {})
    [line] = wrong(NODE, good | change | {"versions": versions}, good)
    assert line.startswith(told)


def test_a_video_service_needs_its_key_and_an_answer_and_no_weights() -> None:
    server = EndpointServer(lambda _: failure(404))
    service = {"base_url": server.url, "api_key_env": "VIDEO_KEY"}
    recipe = load(TINY, [f"render={json.dumps({'kind': 'openai', 'model': 'm', 'endpoint': service})}"])
    ask = doctor.asked(recipe)
    assert "VIDEO_KEY" in ask.variables
    assert not [key for key in ask.readable if key.startswith("render")]
    assert ask.servers == {"render.endpoint.base_url": server.url}
    ask = replace(ask, readable={}, writable={})
    assert doctor.probe(ask)["unreachable"] == {}, "an error is an answer"
    server.close()
    [why] = doctor.probe(ask)["unreachable"].values()
    assert why.startswith(f"{server.url}: ")
    assert "refused" in why


def test_gpus_that_ray_offers_and_no_driver_has(good: dict[str, Any]) -> None:
    node = NODE | {"Resources": NODE["Resources"] | {"GPU": 2.0}}
    [line] = wrong(node, good, good)
    assert line == "GPUs: no driver answers (Ray offers 2)"
    assert wrong(node, good | {"gpus": ["H100, 81559 MiB, 570.1"] * 2}, good) == []


def test_a_clock_and_a_silent_node(good: dict[str, Any]) -> None:
    assert wrong(NODE, good, good, skew=30) == ["clock: 30 s off"]
    assert wrong(NODE, "no answer within 60 s", good) == ["answers: no answer within 60 s"]
    small = NODE | {"Resources": {"object_store_memory": 2.0**20}}
    assert wrong(small, good, good) == ["object store: 0.0 GiB, /dev/shm 2.0 GiB"]


def test_paths_are_tried_and_not_only_looked_at(tmp_path: Path) -> None:
    model, empty, file = tmp_path / "model", tmp_path / "empty", tmp_path / "file"
    model.mkdir()
    (model / "config.json").write_text("{}", "utf-8")
    empty.mkdir()
    file.write_text("no folder", "utf-8")
    ask = doctor.Ask(
        {"a": str(model), "b": str(empty), "c": str(tmp_path / "gone")},
        {"out": str(tmp_path / "run"), "store": str(file / "videos")},
        ("VPO_NO_SUCH_VARIABLE", "PATH"),
    )
    answer = doctor.probe(ask)
    assert set(answer["unreadable"]) == {"b", "c"}
    assert "No such file" in answer["unreadable"]["c"]
    assert set(answer["unwritable"]) == {"store"}
    assert answer["absent"] == ["VPO_NO_SUCH_VARIABLE"]
    assert not list((tmp_path / "run").iterdir()), "nothing is left behind"
    # A node whose folder of the same name is another disk does not see the driver's file.
    elsewhere = doctor.probe(replace(ask, writable={"out": str(tmp_path / "run")}, marker="doctor-of-driver"))
    assert "another disk" in elsewhere["unwritable"]["out"]


def test_models_at_a_uri_are_looked_at_from_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPO_MODEL_CACHE", str(tmp_path / "cache"))
    with bucket("models") as options:
        here, gone = (f"s3://models/{name}?{options}" for name in ("here", "gone"))
        Folder(here).write("config.json", b"{}")
        ask = doctor.asked(load(TINY, [f"out={tmp_path}", f"policy.model={here}", f"judge.model={gone}"]))
        assert (ask.readable["policy.model"], ask.readable["judge.model"]) == (here, gone)
        unreadable = doctor.probe(replace(ask, readable={"policy.model": here, "judge.model": gone}))[
            "unreadable"
        ]
    assert list(unreadable) == ["judge.model"]
    assert "holds no file" in unreadable["judge.model"]


def test_a_recipe_asks_for_its_files_storage_and_keys(tmp_path: Path) -> None:
    sets = [f"out={tmp_path}", f"judge.model={tmp_path}", "reward.checklist.file=s3://b/c.yaml"]
    ask = doctor.asked(load(TINY, [*sets, "reward.kind=openai", "reward.endpoint.api_key_env=MY_KEY"]))
    assert ask.readable["judge.model"] == str(tmp_path)
    assert "reward.model" not in ask.readable
    assert "reward.checklist.file" not in ask.readable
    assert ask.writable == {"out": str(tmp_path)}
    assert ask.variables == ("MY_KEY",)


def test_every_llm_is_asked_for_where_it_is(tmp_path: Path) -> None:
    llm = f"llm: {{model: {tmp_path}}}"
    drafts = f"draft={{examples: e.jsonl, {llm}}}"
    remote = ["judge.backend=openai", f"judge.model={tmp_path}", "judge.endpoint.api_key_env=JUDGE_KEY"]
    ask = doctor.asked(load(TINY, [f"out={tmp_path}", drafts, *remote]))
    assert ask.readable["draft.llm.model"] == str(tmp_path)
    assert "judge.model" not in ask.readable, "a model of the endpoint's is no folder"
    assert ask.variables == ("JUDGE_KEY",)
    by_judge = doctor.asked(load(TINY, [f"out={tmp_path}", "draft={examples: e.jsonl}", *remote]))
    assert by_judge.variables == ("JUDGE_KEY",), "named once, though it judges and drafts"


@pytest.mark.ray
def test_a_real_cluster(
    ray_cluster: None,
    tiny_models: Path,
    tiny_sets: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["doctor", TINY, "--json", "--out", str(tmp_path / "run"), *tiny_sets]
    status = main(arguments)
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    machine = {"disk of /tmp", "object store"}  # what this machine is like is not ours to assert
    assert {name for name, finding in findings.items() if not finding["ok"]} <= machine
    assert {"answers", "versions", "clock", "room for pools", "room for dpo"} <= findings.keys()
    assert "python 3.1" in findings["versions"]["found"]
    assert status == (0 if all(finding["ok"] for finding in findings.values()) else 1)

    bad = ["--set", "policy.model=/no/such/model", "--set", "render.pool.num_gpus=1"]
    bad += ["--set", "more_rewards.other={kind: 'no.such:Model'}"]
    assert main([*arguments, *bad, "--set", "reward.kind=openai"]) == 1
    problems = [f for f in json.loads(capsys.readouterr().out) if not f["ok"]]
    told = {f["check"]: f["found"] for f in problems}
    lacks = [f["where"] for f in problems if f["check"] == "more_rewards.other.kind"]
    assert len(lacks) == 2, "the driver and the node"
    assert "no.such:Model cannot be imported" in told["more_rewards.other.kind"]
    assert "no node has GPU" in told["room for pools"]
    assert ("variable OPENAI_API_KEY" in told) == ("OPENAI_API_KEY" not in os.environ)
    # A path that exists nowhere is read as a hub id at the driver; the node is asked for it all the same.
    assert "No such file" in told["reads policy.model"]
    table = main(["doctor"])
    printed = capsys.readouterr().out
    assert "versions" in printed
    assert table == (0 if "no problem found" in printed else 1)


def test_help_needs_no_cluster() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vpo_ray.cli", "doctor", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "--json" in done.stdout
