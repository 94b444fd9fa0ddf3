"""Runs whose LLM is an endpoint: stopped, killed or refused, they go on and pay nothing twice."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure

from vpo_ray.loop import phases
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import query_id
from vpo_ray.stages.curate import InputError
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.sft_data import CHAT_FILE, sft_rows
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.spending import endpoint_cost

pytestmark = pytest.mark.ray

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
SFT = Path(__file__).parents[2] / "vpo_ray/data/sft.jsonl"
MODELS = Models("nowhere", "test-policy")
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
# 1000 prompt tokens an answer, see endpoint_server.completion.
PRICE, LIMIT = 1.0, 0.02


def answer(request: Request) -> Reply:
    """A judge and writer that finds fault with the first draft of every query about a dog."""
    text = request["messages"][0]["content"]
    query = json.loads(text.rsplit("<request>", 1)[1].split("</request>")[0])
    if query.startswith("refuse"):
        return completion(None, refusal="I would rather not")
    if query.startswith("babble"):
        return completion("Well, it depends.")
    asks_verdict = "verdict" in json.dumps(request["response_format"])
    if not asks_verdict:
        return completion(
            {"prompt": f"A quiet scene: {query}" + (", refined" if "<critique>" in text else "")}
        )
    fine = "dog" not in query or "refined" in text
    verdict = "aligned" if fine else "imprecise"
    return completion({"critique": "so", "missing": [], "added": [], "verdict": verdict})


def recipe_for(folder: Path, server: EndpointServer, *more: str) -> Recipe:
    endpoint = {
        "base_url": server.url, "api_key_env": None, "retries": 0, "timeout_s": 20, "concurrency": 2,
        "prompt_price": PRICE,
    }  # fmt: skip
    judge = {"model": "m", "backend": "openai", "endpoint": endpoint, "engine": {"batch_size": 4},
             "pool": {"size": 1, "num_cpus": 0.1}}  # fmt: skip
    sets = [f"out={folder / 'run'}", f"judge={json.dumps(judge)}", f"draft={{examples: {SFT}}}"]
    return load(TINY, [*sets, "sft.data=null", *more])


def run_of(recipe: Recipe, *queries: str) -> RunDir:
    run = RunDir(recipe.out)
    rows = [{"query_id": query_id(q), "query": q, "source": "t", "split": "sft"} for q in queries]
    run.table("queries").append(rows)
    return run


def asked_twice(server: EndpointServer) -> list[str]:
    counts = Counter(json.dumps(request, sort_keys=True) for request in server.requests)
    return [request for request, count in counts.items() if count > 1]


QUERIES = [f"cat {i}" for i in range(8)] + [f"dog {i}" for i in range(4)]


def test_drafts_of_an_endpoint(tmp_path: Path, ray_cluster: None, serve_endpoint: Serve) -> None:
    server = serve_endpoint(answer)
    recipe = recipe_for(tmp_path, server)
    run = run_of(recipe, *QUERIES, "refuse this", "babble on")
    phases.draft_sft(recipe, run)
    rows = {row["query"]: row for row in run.table("drafts").rows()}
    assert len(rows) == 14
    for query in QUERIES:
        assert rows[query]["target"] == f"A quiet scene: {query}" + (", refined" if "dog" in query else "")
        turns = 4 if "dog" in query else 2
        assert rows[query]["usage"]["draft"] == {
            "prompt": 1000 * turns,
            "completion": 100 * turns,
            "cost": pytest.approx(PRICE * turns / 1000),
        }
    assert "Refusal: the model refused: I would rather not" in rows["refuse this"]["error"]
    assert "even after a repair round" in rows["babble on"]["error"]
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    assert ledger["stages"]["draft"]["out"] == 12
    assert len(ledger["stages"]["draft"]["errored"]) == 2
    assert ledger["stages"]["draft"]["cost"] == pytest.approx(PRICE * len(server.requests) / 1000)
    assert len(list(sft_rows(str(tmp_path / "run" / CHAT_FILE)))) == 12

    count = len(server.requests)
    phases.draft_sft(recipe, run)
    assert len(server.requests) == count, "a second run asks nothing"
    phases.draft_sft(recipe, run, retry_errors=True)
    assert len(server.requests) == count + 3, "the refusal, and the babble with its repair round"
    drafted = build_ledger(run, recipe)["stages"]["draft"]
    assert drafted["requests"] == len(server.requests), "rows that failed twice are in no table twice"
    assert drafted["cost"] == pytest.approx(PRICE * len(server.requests) / 1000)
    assert endpoint_cost(run) == pytest.approx(drafted["cost"])


@pytest.mark.slow
def test_the_limit_of_cost_stops_a_run_that_goes_on_later(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    server = serve_endpoint(answer)
    limited = recipe_for(tmp_path, server, f"limits.max_cost={LIMIT}")
    run = run_of(limited, *QUERIES)
    with pytest.raises(GenerationError, match=r"max_cost 0.02 is reached.*(\n.*)*what was made is kept"):
        phases.draft_sft(limited, run)
    first = len(server.requests)
    assert 20 <= first <= 20 + 2, "what was under way when the limit was reached goes beyond it"
    assert endpoint_cost(run) == pytest.approx(PRICE * first / 1000), "also for rows that are in no table yet"
    assert all(row["error"] is None for row in run.table("drafts").rows()), "a limit is no row's error"
    with pytest.raises(GenerationError, match="max_cost"):
        phases.draft_sft(limited, run)
    assert len(server.requests) == first
    more = recipe_for(tmp_path, server, "limits.max_cost=1")
    phases.draft_sft(more, run)
    assert len(list(run.table("drafts").rows())) == 12
    assert len(server.requests) == 8 * 2 + 4 * 4
    assert asked_twice(server) == []
    assert endpoint_cost(run) == pytest.approx(PRICE * len(server.requests) / 1000)


def test_the_judge_labels_the_unsafe_share(tmp_path: Path, ray_cluster: None, serve_endpoint: Serve) -> None:
    def label(request: Request) -> Reply:
        text = request["messages"][0]["content"]
        query = json.loads(text.rsplit("<text>", 1)[1].split("</text>")[0])
        if query.startswith("babble"):
            return completion("Well, it depends.")
        return completion({"reason": "it barks", "unsafe": "dog" in query})

    server = serve_endpoint(label)
    (tmp_path / "queries.txt").write_text("\n".join([*QUERIES, QUERIES[0], "babble on"]), "utf-8")
    queries = f"queries={{path: {tmp_path / 'queries.txt'}, size: 6, unsafe_share: 0.5, unsafe_judge: true}}"
    recipe = recipe_for(tmp_path, server, queries)
    run = RunDir(recipe.out)
    phases.curate_queries(recipe, run)
    chosen = list(run.table("queries").rows())
    assert [len(chosen), sum(row["unsafe"] is True for row in chosen)] == [6, 3]
    assert all("dog" in row["query"] for row in chosen if row["unsafe"])
    assert len(server.requests) == 12 + 2, "each query once, and a repair round for the one that babbles"
    ledger = build_ledger(run, recipe)
    assert not [line for line in reconcile(ledger) if line.startswith("label")]
    labelled = ledger["stages"]["label"]
    assert labelled["verdicts"] == {"safe": 8, "unsafe": 4}
    assert sum(labelled["errored"].values()) == 1
    assert endpoint_cost(run) == pytest.approx(PRICE * len(server.requests) / 1000)
    phases.curate_queries(recipe, run)
    assert len(server.requests) == 14

    few = recipe_for(tmp_path, server, queries.replace("0.5", "0.9"), f"out={tmp_path / 'few'}")
    with pytest.raises(InputError, match=r"5 that are labelled unsafe .* only 4 of"):
        phases.curate_queries(few, RunDir(few.out))


def test_a_wrong_key_is_one_message_and_no_row(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    server = serve_endpoint(lambda _: failure(401, "Incorrect API key"))
    recipe = recipe_for(tmp_path, server)
    run = run_of(recipe, *QUERIES)
    with pytest.raises(GenerationError, match=r"judge.endpoint refuses this: .*Incorrect API key"):
        phases.draft_sft(recipe, run)
    assert list(run.table("drafts").rows()) == []
    absent = recipe_for(tmp_path, server, "judge.endpoint.api_key_env=NO_SUCH_KEY_HERE")
    with pytest.raises(GenerationError, match="the variable NO_SUCH_KEY_HERE is not set here"):
        phases.draft_sft(absent, run)


@pytest.mark.slow
def test_a_replica_that_is_killed_asks_only_what_was_under_way_again(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    """Its answers are kept one by one, so that the batch under it is not paid again."""
    gate = threading.Event()

    def slow(request: Request) -> Reply:
        if len(server.requests) > 12:
            gate.wait(5)
        return answer(request)

    server = serve_endpoint(slow)
    recipe = recipe_for(tmp_path, server)
    run = run_of(recipe, *QUERIES)

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(server.requests) <= 12 and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "MapBatches(draft)" in " ".join(process.cmdline()):
                killed.append(process.pid)
                process.kill()
        gate.set()

    killed: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    phases.draft_sft(recipe, run)
    killer.join()
    assert len(killed) == 1
    assert len(list(run.table("drafts").rows())) == 12
    assert all(row["target"] for row in run.table("drafts").rows())
    assert len(asked_twice(server)) <= 2, "two were under way"
    assert len(server.requests) <= 8 * 2 + 4 * 4 + 2


@pytest.mark.slow
def test_replicas_share_the_budget_of_requests(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    server = serve_endpoint(answer)
    more = [
        "judge.endpoint.requests_per_minute=300",
        "judge.pool.size=2",
        "judge.endpoint.answers=" + str(tmp_path),
    ]
    recipe = recipe_for(tmp_path, server, *more, "queries.splits={sft: 1}")
    run = run_of(recipe, *QUERIES)
    generate(recipe, run, MODELS, ("draft",))
    times = sorted(server.times)
    assert len(times) == 32
    assert times[-1] - times[0] >= 31 * 0.2 * 0.98, "300 a minute for both together"
