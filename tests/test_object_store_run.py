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

import pytest
from clusters import ROOT, free_port
from s3_server import bucket, upload

from vpo_ray.cache_folder import VARIABLE
from vpo_ray.ledger import reconcile
from vpo_ray.storage import Folder, RunDir

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


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    with bucket("vpo") as options:
        yield options


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


def test_a_run_on_an_object_store_killed_goes_on_and_is_served_from_there(
    tiny_models: Path, options: str, tmp_path: Path
) -> None:
    def uri(place: str) -> str:
        return f"s3://vpo/{place}?{options}"

    queries = tmp_path / "queries.txt"
    animals = ["cat", "dog", "owl", "fox", "hen", "eel", "emu", "yak"]
    queries.write_text("\n".join(f"a {animal} in the rain" for animal in animals))
    # Models on a disk give the same rows as those in a store but for what their names decide: ids. The
    # run that nothing disturbs has them in the store, too, and is itself on a disk.
    models = {key: upload(tiny_models / name, uri(f"models/{name}")) for key, name in MODELS.items()}
    models["reward.checklist.file"] = uri("models/reward/checklist.yaml")
    recipe = [str(ROOT / "jobs/recipes/tiny.yaml"), *sets({**models, **SETTINGS, "queries.path": queries})]
    undisturbed = RunDir(tmp_path / "undisturbed")
    done("run", *recipe, "--out", str(undisturbed.path))

    run = RunDir(uri("runs/one"))
    start = vpo("run", *recipe, "--out", run.uri)
    # In training, behind a checkpoint, and in the middle of the videos.
    for what in ("checkpoints/sft-", "feedback/"):
        with open(tmp_path / "killed.log", "wb") as log:
            driver = subprocess.Popen(start, stdout=log, stderr=log, cwd=ROOT)
        try:
            deadline = time.monotonic() + 500
            while not any(name.startswith(what) for name in run.files()) and driver.poll() is None:
                assert time.monotonic() < deadline, f"no {what} in time"
                time.sleep(0.2)
            assert driver.poll() is None, (tmp_path / "killed.log").read_text()[-6000:]
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait(timeout=30)
    done("run", *recipe, "--out", run.uri)
    assert made(run) == made(undisturbed)
    assert reconcile(run.read_json("ledger.json")) == []
    assert run.metrics("sft")
    assert run.metrics("dpo")
    assert any(name.startswith("metrics/tensorboard/dpo/events") for name in run.files())
    assert isinstance(run.read_json("example.json")["dpo"], str)
    assert not [name for name in run.files() if name.startswith("checkpoints/sft-")]

    # What follows a run.
    assert run.uri in done("report", *recipe, "--out", run.uri)
    page = run.read("report/index.html").decode()
    assert "a cat in the rain" in page
    shown = set(re.findall(r'src="\.\./(videos/[^"]+\.mp4)"', page))
    assert shown
    assert shown <= set(run.files())
    assert "after DPO" in done("evaluate", *recipe, "--out", run.uri)
    done("export", *recipe, "--out", run.uri, "--format", "trl", "--to", uri("export"))
    assert json.loads(Folder(uri("export")).read("preference.jsonl").splitlines()[0])["chosen"]
    done("plan", *recipe, "--out", run.uri, "--ledger", run.uri)
    assert len(done("submit", *recipe, "--out", run.uri, "--print-id").strip()) > 10

    # `vpo serve` of the URI, and of a canary beside it that is one, too.
    port = free_port()
    beside = f"{{checkpoint: '{run.at('checkpoints/sft')}', share: 0.5}}"
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
    cache = tmp_path / "cache"
    assert list(cache.glob("*.part")) == []


def answered(port: int, server: subprocess.Popen[bytes], log: Path) -> dict[str, object]:
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
                return json.load(reply)  # type: ignore[no-any-return]
        except OSError:
            assert server.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
