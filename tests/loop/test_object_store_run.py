"""A whole run on an object store with real engines: models at URIs, the driver killed, what follows a run."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import ROOT, free_port
from s3_server import bucket, upload

from vpo_ray.files.folder import Folder
from vpo_ray.loop.ledger import reconcile
from vpo_ray.storage.cache_folder import VARIABLE
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

# The models that a recipe names, with the folders of the tiny ones.
MODELS = {"policy.model": "policy", "judge.model": "judge", "render.model": "video", "reward.model": "reward"}
SETTINGS = {
    "queries.splits": "{dpo: 0.7, eval: 0.3}",
    "sft.epochs": 2,
    "sft.workers": 1,
    "sft.save_steps": 4,
    "dpo.workers": 1,
    "dpo.track.tensorboard": "true",
    "pair.margin": 0.0,
    "sample.k": 2,
}


def vpo(*words: str) -> list[str]:
    return [sys.executable, "-m", "vpo_ray.cli", *words]


def done(*words: str) -> str:
    """What a command says that has to end well."""
    ended = subprocess.run(vpo(*words), capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert ended.returncode == 0, f"{words}: {ended.stderr[-6000:]}"
    return ended.stdout


def sets(values: dict[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def made(run: RunDir) -> dict[str, object]:
    """What a run computed, without what may differ between two (seconds, places)."""
    rows = {row["candidate_id"]: row for row in run.table("feedback").rows()}
    columns = ("query", "k", "prompt", "verdict", "refined_prompt", "video_key", "score", "error")
    return {
        "feedback": {key: [row[name] for name in columns] for key, row in rows.items()},
        "pairs": run.table("pairs").keys(),
    }


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The options of URIs of the store, and a cache of its own for what is fetched from there."""
    with pytest.MonkeyPatch.context() as environment, bucket("vpo") as options:
        environment.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache") / "models"))
        yield options


@pytest.fixture(scope="module")
def recipe(tiny_models: Path, options: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny recipe with every model at a URI, as words of a command."""
    queries = tmp_path_factory.mktemp("queries") / "queries.txt"
    animals = ["cat", "dog", "owl", "fox", "hen", "eel", "emu", "yak"]
    queries.write_text("\n".join(f"a {animal} in the rain" for animal in animals), "utf-8")
    models = {
        key: upload(tiny_models / name, f"s3://vpo/models/{name}?{options}") for key, name in MODELS.items()
    }
    models["reward.checklist.file"] = f"s3://vpo/models/reward/checklist.yaml?{options}"
    return [str(ROOT / "jobs/recipes/tiny.yaml"), *sets({**models, **SETTINGS, "queries.path": queries})]


@pytest.fixture(scope="module")
def run(recipe: list[str], options: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run in the store whose driver was killed twice."""
    run, logs = RunDir(f"s3://vpo/runs/one?{options}"), tmp_path_factory.mktemp("logs")
    start = vpo("run", *recipe, "--out", run.uri)
    # In training, behind a checkpoint, and in the middle of the videos.
    for number, what in enumerate(("checkpoints/sft-[^/]+/step-", "feedback/")):
        with open(logs / f"{number}.log", "wb") as log:
            driver = subprocess.Popen(start, stdout=log, stderr=log, cwd=ROOT)
        try:
            deadline = time.monotonic() + 500
            while not any(re.match(what, name) for name in run.files()) and driver.poll() is None:
                assert time.monotonic() < deadline, f"no {what} in time"
                time.sleep(0.2)
            assert driver.poll() is None, (logs / f"{number}.log").read_text("utf-8")[-6000:]
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait(timeout=30)
    done("run", *recipe, "--out", run.uri)
    return run


def test_it_ends_with_the_rows_of_a_run_on_a_disk_that_nothing_disturbs(
    run: RunDir, recipe: list[str], tmp_path: Path
) -> None:
    undisturbed = RunDir(tmp_path / "undisturbed")
    done("run", *recipe, "--out", str(undisturbed.path), "--set", "dpo=null")
    assert made(run) == made(undisturbed)
    assert reconcile(run.read_json("ledger.json")) == []
    assert not [name for name in run.files() if name.startswith("checkpoints/sft-")]


def test_what_it_leaves_is_whole(run: RunDir) -> None:
    assert run.metrics("sft")
    assert run.metrics("dpo")
    assert any(name.startswith("metrics/tensorboard/dpo/events") for name in run.files())
    assert isinstance(run.read_json("example.json")["dpo"], str)


def test_the_commands_behind_it(run: RunDir, recipe: list[str], options: str) -> None:
    assert run.at("report/index.html") in done("report", *recipe, "--out", run.uri)
    page = run.read("report/index.html").decode()
    shown = set(re.findall(r'src="\.\./(videos/[^"#]+\.mp4)', page))
    # Which pairs random weights give differs between machines.
    assert shown or not any(row["kind"] == "video" for row in run.table("pairs").rows(["kind"]))
    assert shown <= set(run.files())
    exported = f"s3://vpo/export?{options}"
    done("export", *recipe, "--out", run.uri, "--format", "trl", "--to", exported)
    assert json.loads(Folder(exported).read("preference.jsonl").splitlines()[0])["chosen"]
    done("plan", *recipe, "--out", run.uri, "--ledger", run.uri)
    assert done("submit", *recipe, "--out", run.uri, "--print-id").startswith("vpo-tiny-run-")


def test_its_policies_are_evaluated(run: RunDir, recipe: list[str]) -> None:
    assert "dpo" in done("evaluate", *recipe, "--out", run.uri)
    results = run.read_json(run.read_json("evaluation.json")["results"])
    assert results["sets"]["eval"]["n"] > 0


def test_its_policies_are_served_from_there(run: RunDir, recipe: list[str], tmp_path: Path) -> None:
    """The one after DPO, and the one before as a canary beside it."""
    port = free_port()
    beside = json.dumps({"checkpoint": run.at("checkpoints/sft"), "share": 0.5})
    serve = vpo("serve", run.at("checkpoints/dpo"), "--recipe", *recipe, *sets({"serve.port": port}))
    with open(tmp_path / "serve.log", "wb") as log:
        server = subprocess.Popen([*serve, *sets({"serve.canary": beside})], stdout=log, stderr=log, cwd=ROOT)
    try:
        told = answered(port, server, tmp_path / "serve.log")
        assert isinstance(told["choices"][0]["message"]["content"], str)
        assert told["system_fingerprint"].startswith("vpo-")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=90)
        finally:
            server.kill()


def answered(port: int, server: subprocess.Popen[bytes], log: Path) -> Any:
    body = {"model": "vpo", "seed": 1, "messages": [{"role": "user", "content": "cat"}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 400
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except OSError:
            assert server.poll() is None, log.read_text("utf-8")[-6000:]
            assert time.monotonic() < deadline, log.read_text("utf-8")[-6000:]
            time.sleep(1)
