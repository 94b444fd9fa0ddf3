"""A roll-out and a killed replica under load, metrics, the config file: what an operator relies on."""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from tiny_endpoint import SETTINGS, TINY

from vpo_ray.cli import main
from vpo_ray.prompts.policy_prompt import PromptError
from vpo_ray.recipe import load_serve
from vpo_ray.recipe.serve import Autoscaling, Canary
from vpo_ray.serve.policy import takes_canary


def test_the_config_file_is_one_that_serve_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    from vpo_ray.serve.app import Arguments, app

    capsys.readouterr()  # what those imports print
    monkeypatch.chdir(tmp_path)  # whatever was trained before, no policy is here
    options = ["--recipe", str(TINY), "--set", "serve.host=0.0.0.0", "--set", "serve.keys=/etc/vpo/keys"]
    assert main(["serve", "runs/demo/checkpoints/dpo", *options, "--config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    application = ServeDeploySchema.model_validate(tree).applications[0]
    assert application.import_path == "vpo_ray.serve.app:app"
    settings = Arguments.model_validate(application.args).serve
    assert settings == load_serve(str(TINY), ["serve.host=0.0.0.0", "serve.keys=/etc/vpo/keys"])
    assert tree["http_options"]["host"] == "0.0.0.0"
    with pytest.raises(PromptError, match="checkpoints/dpo does not exist"):
        build(app, application.args)
    cloned = tmp_path / "runs/demo/checkpoints/dpo"
    cloned.mkdir(parents=True)
    (cloned / "config.json").write_text("{}", "utf-8")
    (cloned / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")
    with pytest.raises(PromptError, match="git-LFS pointers"):
        build(app, application.args)


def test_a_canary_takes_its_share_and_keeps_its_queries() -> None:
    queries = [f"query {number}" for number in range(2000)]
    tenth = {query for query in queries if takes_canary(query, 0.1)}
    assert 150 < len(tenth) < 250
    assert tenth < {query for query in queries if takes_canary(query, 0.3)}
    assert not any(takes_canary(query, 0) for query in queries)
    assert all(takes_canary(query, 1) for query in queries)


@contextmanager
def load(url: str) -> Iterator[Counter[str]]:
    """Callers that ask one query after another; what they got, by outcome or checkpoint."""
    seen: Counter[str] = Counter()
    stop = threading.Event()

    def call(number: int) -> None:
        with httpx.Client(timeout=150) as client:
            for n in range(10_000):
                if stop.is_set():
                    return
                body = {"query": f"a cat, number {number} of {n}", "temperature": 0}
                try:
                    reply = client.post(f"{url}/optimize", json=body)
                    found = reply.json()
                    seen[found.get("system_fingerprint") or f"{reply.status_code} {reply.text[:80]}"] += 1
                except httpx.HTTPError as error:
                    seen[type(error).__name__] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(160)


def until(true: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it ended meanwhile


def engine_pid() -> int:
    """vLLM's engine process of the newest replica."""
    processes = psutil.Process(os.getpid()).children(recursive=True)
    found = [p for p in processes if "ServeReplica:vpo:PolicyServer" in _command(p)]
    children = max(found, key=lambda p: p.create_time()).children(recursive=True)
    return next(p.pid for p in children if "EngineCore" in " ".join(p.cmdline()))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_no_request_fails_while_a_checkpoint_is_rolled_out_killed_and_rolled_back(
    brief: str, checkpoint: str, tmp_path: Path
) -> None:
    from ray import serve

    from vpo_ray.serve.run import deploy

    other = shutil.copytree(checkpoint, tmp_path / "other")
    with load(brief) as seen:
        until(lambda: sum(seen.values()) > 5)
        (old,) = seen
        deploy(str(other), SETTINGS)
        until(lambda: len(seen) > 1)
        (new,) = set(seen) - {old}
        before = seen[new]
        # The only replica loses its engine and leaves. What it had is answered by the next one.
        os.kill(engine_pid(), signal.SIGKILL)
        until(lambda: seen[new] > before + 3)
        back = seen[old]
        deploy(checkpoint, SETTINGS)
        until(lambda: seen[old] > back + 3)
    assert set(seen) == {old, new}, "every request was answered by the one or the other"
    assert old.startswith("vpo-")
    assert serve.status().applications["vpo"].status == "RUNNING"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_a_canary_answers_its_share_of_the_queries(url: str, checkpoint: str, tmp_path: Path) -> None:
    from vpo_ray.serve.run import deploy

    other = shutil.copytree(checkpoint, tmp_path / "other")
    canary = Canary(checkpoint=str(other), share=0.5)
    deploy(checkpoint, SETTINGS.model_copy(update={"canary": canary, "max_tokens": 12}))
    try:
        answered: dict[str, set[str]] = {}
        for query in [f"a cat, number {number}" for number in range(12)] * 2:
            reply = httpx.post(f"{url}/optimize", json={"query": query}, timeout=120).json()
            answered.setdefault(query, set()).add(reply["system_fingerprint"])
    finally:
        deploy(checkpoint, SETTINGS)
    assert all(len(found) == 1 for found in answered.values()), "a query stays with its checkpoint"
    assert len(set.union(*answered.values())) == 2
    by_canary = [query for query in answered if takes_canary(query, 0.5)]
    assert len(set.union(*(answered[query] for query in by_canary))) == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_an_adapter_is_served_on_its_base_model(url: str, adapted: tuple[Path, Any], checkpoint: str) -> None:
    """What the endpoint answers is what transformers and peft give, and not what the base model gives."""
    import torch

    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import prompt_ids
    from vpo_ray.serve.run import deploy

    folder, model = adapted
    tokenizer, query = load_tokenizer(str(folder)), "the sea at night"
    ids = torch.tensor([prompt_ids(tokenizer, query)])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False, temperature=None, top_p=None)
    body = {"model": "vpo", "messages": [{"role": "user", "content": query}]}
    ask = {**body, "temperature": 0, "max_tokens": 12}
    before = httpx.post(f"{url}/chat/completions", json=ask, timeout=120).json()
    deploy(str(folder), SETTINGS)
    try:
        answer = httpx.post(f"{url}/chat/completions", json=ask, timeout=120).json()
    finally:
        deploy(checkpoint, SETTINGS)
    text = answer["choices"][0]["message"]["content"]
    assert text.strip() == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert text != before["choices"][0]["message"]["content"], "the adapter changes the text"
    assert answer["model"] == "vpo"
    assert answer["system_fingerprint"] != before["system_fingerprint"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_replicas_follow_the_load(brief: str, checkpoint: str) -> None:
    from ray import serve

    from vpo_ray.serve.run import deploy

    def running() -> int:
        return serve.status().applications["vpo"].deployments["PolicyServer:vpo"].replica_states["RUNNING"]

    pool = SETTINGS.pool.model_copy(update={"size": (1, 2)})
    scaling = Autoscaling(target_ongoing_requests=1, upscale_delay_s=1, downscale_delay_s=2)
    deploy(checkpoint, SETTINGS.model_copy(update={"pool": pool, "autoscaling": scaling}))
    try:
        assert running() == 1
        with load(brief) as seen:
            until(lambda: running() == 2)
        until(lambda: running() == 1)
    finally:
        deploy(checkpoint, SETTINGS)
    assert [name for name in seen if not name.startswith("vpo-")] == [], "every request was answered"


@pytest.mark.ray
@pytest.mark.engine
def test_more_than_can_wait_are_told_to_come_back(brief: str) -> None:
    def call(number: int) -> httpx.Response:
        return httpx.post(f"{brief}/optimize", json={"query": f"a cat, number {number}"}, timeout=60)

    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(call, range(80)))
    assert Counter(reply.status_code for reply in replies).keys() == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["Retry-After"]) > 0


@pytest.mark.ray
@pytest.mark.engine
def test_prometheus_has_callers_outcomes_and_tokens(brief: str) -> None:
    import ray

    httpx.post(f"{brief}/optimize", json={"queries": ["a", "b", "c", "d", "e", "f"]}, timeout=60)
    httpx.post(f"{brief}/optimize", json={})
    port = ray.nodes()[0]["MetricsExportPort"]

    def exported(text: str) -> list[str]:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        return [line for line in lines if "vpo_serve" in line and text in line]

    # A replica hands its counts on every few seconds.
    for text in ('outcome="200"', 'outcome="422"', 'key="anyone"', 'variant="main"', 'variant="canary"'):
        until(lambda text=text: exported(text), 40)
    for name in ("seconds_bucket", "tokens", "running"):
        until(lambda name=name: exported(f"vpo_serve_{name}"), 40)

    # A stream counts, too, whether its client asked for its usage or not.
    def read() -> float:
        return sum(float(line.split()[-1]) for line in exported('kind="prompt"'))

    before = read()
    messages = [{"role": "user", "content": "a very " * 300 + "red cat"}]
    body = {"model": SETTINGS.model_name, "messages": messages, "max_tokens": 4, "stream": True}
    assert "[DONE]" in httpx.post(f"{brief}/chat/completions", json=body, timeout=60).text
    until(lambda: read() >= before + 300, 40)
