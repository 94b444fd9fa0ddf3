"""One account for a run, whatever its rounds and evaluations: every paid answer is in it, once."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion

from vpo_ray.engines.chat import Usage
from vpo_ray.engines.endpoint.account import Account, CostLimitReached
from vpo_ray.files.folder import StorageError
from vpo_ray.loop import opening, rounds
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.recipe import Recipe, load
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.run_dir import ROUND, RunDir
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream import spending
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.progress import Progress
from vpo_ray.stream.spending import Book, Charges, endpoint_cost

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
PRICE = 1.0  # a request has 1000 prompt tokens: it costs 0.001
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


def pay(run: RunDir, stage: str, *costs: float) -> None:
    root, place = run.root()
    book = Book(root.uri, place)

    async def enter() -> None:
        await asyncio.gather(*(book.enter(stage, Charges(1, 10, 1, cost)) for cost in costs))

    asyncio.run(enter())


def part(run: RunDir, name: str) -> RunDir:
    """A round or an evaluation of a run."""
    found = RunDir(run.at(name))
    found.write_json(ROUND, {"start": {}})
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load(TINY, [f"out={tmp_path / 'run'}", "sft=null"])


def test_rounds_and_evaluations_pay_into_the_account_of_their_run(recipe: Recipe) -> None:
    run = RunDir(recipe.out)
    second, evaluation = part(run, "rounds/2"), part(run, "evaluation/ab")
    nested = part(second, "evaluation/cd")
    for where, cost in ((run, 1.0), (second, 2.0), (evaluation, 4.0), (nested, 8.0)):
        pay(where, "judge", cost)
    pay(run, "score", 16.0, 32.0)
    assert {endpoint_cost(where) for where in (run, second, evaluation, nested)} == {63.0}
    assert nested.root()[1] == "rounds/2/evaluation/cd"
    assert not second.exists("account")
    ledger = build_ledger(run, recipe)
    assert ledger["paid"] == {
        "cost": 63.0,
        "runs": {".": 49.0, "rounds/2": 2.0, "evaluation/ab": 4.0, "rounds/2/evaluation/cd": 8.0},
    }
    scored = ledger["stages"]["score"]
    assert (scored["cost"], scored["requests"], scored["tokens"]) == (
        48.0, 2, {"prompt": 20, "completion": 2},
    )  # fmt: skip
    own = build_ledger(second, recipe)
    assert (own["stages"]["judge"]["cost"], "paid" in own) == (2.0, False)


def test_a_stream_sees_what_those_of_other_shards_pay(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(recipe.out)
    pay(run, "judge", 1.0)
    streams = [Progress(["judge"], endpoint_cost(run), (run.uri, "")) for _ in range(2)]

    async def charged() -> list[float]:
        return [await streams[n].charge("judge", Charges(1, 10, 1, cost)) for n, cost in ((0, 2.0), (1, 4.0))]

    assert asyncio.run(charged()) == [3.0, 5.0], "not looked up yet"
    monkeypatch.setattr(spending, "LOOK_S", 0.0)
    assert asyncio.run(charged()) == [9.0, 13.0]
    assert endpoint_cost(run) == 13.0


def test_a_run_directory_that_was_moved_is_still_one_run(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(recipe.out)
    pay(part(run, "rounds/2"), "judge", 2.0)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = RunDir(tmp_path / "moved/rounds/2")
    pay(moved, "judge", 1.0)
    assert endpoint_cost(moved) == endpoint_cost(RunDir(tmp_path / "moved")) == 3.0
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_called_like_a_round_is_a_run_of_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "rounds/2")
    assert (run.root()[0].uri, run.root()[1]) == (run.uri, "")


def judged(number: int, cost: float, **more: Any) -> dict[str, Any]:
    used = {"usage": {"judge": {"prompt": 1000, "completion": 0, "cost": cost}}}
    row = {"candidate_id": str(number), "query_id": "q", "query": "q", "k": number, "seed": 1, "prompt": "x"}
    return {**row, **used, **more}


def test_rows_count_where_the_account_says_less(recipe: Recipe) -> None:
    """Of a run of an earlier version, which had no account, and goes on with one."""
    run = RunDir(recipe.out)
    run.table("verdicts").append([judged(0, 1.0), judged(1, 2.0)])
    assert endpoint_cost(run) == 3.0
    assert build_ledger(run, recipe)["paid"]["cost"] == 3.0
    pay(run, "judge", 0.5)
    run.table("verdicts").append([judged(2, 0.5)])
    assert endpoint_cost(run) == 3.5
    pay(run, "draft", 1.0)
    assert endpoint_cost(run) == 4.5


def test_what_rows_do_not_tell_is_in_the_account(recipe: Recipe) -> None:
    """A failed row that was tried again is in no table any more; its answers were paid."""
    run = RunDir(recipe.out)
    pay(run, "judge", 1.0, 1.0)
    failed = judged(0, 1.0, error="ChatError: no", error_stage="judge", prompt="x")
    run.table("verdicts").append([failed])
    run.table("verdicts").append([judged(0, 1.0, verdict="aligned")])
    assert endpoint_cost(run) == 2.0
    entry = build_ledger(run, recipe)["stages"]["judge"]
    assert (entry["cost"], entry["requests"]) == (2.0, 2)


def test_many_charges_at_once_are_few_writes_and_all_there(tmp_path: Path) -> None:
    writes = []

    async def main() -> float:
        progress = Progress(["judge"], 1.0, (str(tmp_path), ""))
        assert progress._book is not None
        folder = progress._book._folder
        write = folder.write_json

        def counted(*arguments: Any) -> None:
            writes.append(json.loads(json.dumps(arguments[1])))
            write(*arguments)

        folder.write_json = counted  # type: ignore[method-assign]
        charge = Charges(1, 10, 1, 0.25)
        return max(await asyncio.gather(*(progress.charge("judge", charge) for _ in range(100))))

    assert asyncio.run(main()) == 26.0
    assert len(writes) <= 3
    assert endpoint_cost(RunDir(tmp_path)) == 25.0


def test_what_a_copy_by_macos_leaves_in_the_account_is_nothing(recipe: Recipe) -> None:
    run = RunDir(recipe.out)
    pay(run, "judge", 1.0)
    run.write("account/._ab.json", b"Mac OS X")
    assert endpoint_cost(run) == 1.0


def test_a_damaged_account_is_named(recipe: Recipe) -> None:
    run = RunDir(recipe.out)
    run.write("account/a.json", b"{")
    with pytest.raises(StorageError, match=r"account/a\.json, which says what was paid, cannot be read"):
        endpoint_cost(run)


def test_later_rounds_take_the_first_ones_queries(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are neither read nor labelled again; and the root's ledger tells what a round paid."""
    first = opening.open_run(recipe)
    query = {"query_id": "q", "query": "a cat", "split": "dpo", "unsafe": True}
    first.table("queries").append([query])
    first.table("dropped").append([{"row_id": "r", "reason": "empty"}])
    first.write_json("meta/queries.json", {"queries": 1, "dropped": 1})

    def one(own: Recipe, *_: Any, **__: Any) -> RunDir:
        run = RunDir(own.out)
        opening.write_ledger(own, run)
        if run.uri != first.uri:
            assert list(run.table("queries").rows(["query", "unsafe"])) == [
                {"query": "a cat", "unsafe": True}
            ]
            assert run.table("dropped").count() == 1
            assert run.exists("meta/queries.json")
            pay(run, "judge", 2.0)
        return run

    monkeypatch.setattr(rounds, "run_loop", one)
    rounds.run_rounds(recipe, 2)
    assert first.read_json("ledger.json")["paid"] == {"cost": 2.0, "runs": {"rounds/2": 2.0}}


# The reward


def yes(request: Request) -> Reply:
    return completion({"answer": "yes"})


def reward_of(server: EndpointServer, tiny_models: Path, **more: Any) -> dict[str, Any]:
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "prompt_price": PRICE, **more}
    checklist = {"file": str(tiny_models / "reward/checklist.yaml")}
    return {"kind": "openai", "model": "vlm", "endpoint": endpoint, "checklist": checklist}


def videos(run: RunDir, clip: Callable[..., bytes], count: int) -> list[dict[str, Any]]:
    store = VideoStore(run.at("videos"))
    for number in range(count):
        store.write(f"video{number}", clip(number), {})
    return [
        judged(n, 0.0, verdict="aligned", video_key=f"video{n}", video_uri=store.uri(f"video{n}"), usage=None)
        for n in range(count)
    ]


def test_every_reward_behind_an_endpoint_is_charged(
    recipe: Recipe, tiny_models: Path, clip: Callable[..., bytes], serve_endpoint: Serve
) -> None:
    server = serve_endpoint(yes)
    whole = load(TINY, [f"reward={json.dumps(reward_of(server, tiny_models, concurrency=2))}"]).reward
    run, account = RunDir(recipe.out), Account()
    rows = videos(run, clip, 2)
    scorer = Scorer(whole, run.at("videos"), {"other": whole}, account)
    assert all(row["error"] is None for row in scorer(rows))
    assert len(server.requests) == 2 * 2 * 8, "videos, rewards, questions"
    assert account.spent == pytest.approx(PRICE * len(server.requests) / 1000)
    before = len(server.requests)
    account.limit = account.spent + 0.0035
    with pytest.raises(CostLimitReached):
        scorer(rows)
    more = len(server.requests) - before
    assert 4 <= more <= 5
    assert account.spent == pytest.approx(PRICE * len(server.requests) / 1000), "what was under way is paid"


@pytest.mark.ray
def test_the_limit_of_cost_is_one_for_all_stages_and_rounds(
    ray_cluster: None, tmp_path: Path, tiny_models: Path, clip: Callable[..., bytes], serve_endpoint: Serve
) -> None:
    server = serve_endpoint(yes)
    reward = json.dumps(reward_of(server, tiny_models, concurrency=2))
    sets = [f"out={tmp_path / 'run'}", f"reward={reward}", "limits.max_cost=0.105", "sample.k=2"]
    recipe = load(TINY, sets)
    run = RunDir(recipe.out)
    second = part(run, "rounds/2")
    pay(run, "judge", 0.1)
    second.table("renders").append(videos(second, clip, 2))
    for _ in range(2):
        with pytest.raises(GenerationError, match=r"max_cost 0.105 is reached"):
            generate(recipe, second, Models("nowhere", "policy"), ("score",))
        assert 5 <= len(server.requests) <= 6
    assert endpoint_cost(run) == pytest.approx(0.1 + PRICE * len(server.requests) / 1000)
    generate(load(TINY, [*sets, "limits.max_cost=1"]), second, Models("nowhere", "policy"), ("score",))
    assert second.table("feedback").count() == 2
    scored = build_ledger(second, recipe)["stages"]["score"]
    assert scored["requests"] == len(server.requests)
    assert scored["tokens"]["prompt"] == 1000 * len(server.requests)
    assert endpoint_cost(second) == pytest.approx(0.1 + PRICE * len(server.requests) / 1000)


def test_an_account_that_was_not_there_before_counts_what_is_found() -> None:
    account = Account()
    asyncio.run(account.found(1.0))
    asyncio.run(account.charge(Usage(1, 1, 2.0)))
    assert account.spent == 3.0
