"""Shards: the queries of a run, divided among drivers that work at one time."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from endpoint_server import EndpointServer, Reply, Request, completion
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.cli import main
from vpo_ray.loop import phases
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.opening import opened
from vpo_ray.loop.policies import LoopError, policy_id
from vpo_ray.loop.shards import generate_shard
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Shard, query_id
from vpo_ray.stages import facts
from vpo_ray.stages.chains import CHAINS, Models
from vpo_ray.stages.made_with import OtherInputsError, refuse_other_inputs
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.spending import endpoint_cost

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
SFT = Path(__file__).parents[2] / "vpo_ray/data/sft.jsonl"
PRICE = 1.0  # of 1000 prompt tokens, which is what an answer takes
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


def taken(ids: list[str], of: int) -> list[list[str]]:
    """The ids that each shard takes."""
    rows = pa.table({"query_id": pa.array(ids, pa.string())})
    return [rows.filter(Shard(n, of).rows)["query_id"].to_pylist() for n in range(1, of + 1)]


ANY_ID = st.one_of(
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.sampled_from(["0" * 32, "f" * 32, "7" + "f" * 31, "8" + "0" * 31, "", "q1"]),
)


@given(st.lists(ANY_ID, max_size=20), st.integers(1, 40))
def test_every_query_is_in_exactly_one_shard(ids: list[str], of: int) -> None:
    assert Counter(query for part in taken(ids, of) for query in part) == Counter(ids)


def test_shards_are_of_about_one_size() -> None:
    ids = [query_id(f"query {n}") for n in range(8000)]
    assert all(850 < len(part) < 1150 for part in taken(ids, 8))


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "1/8/2", "a/b", "3 of 8"])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text or "''")):
        Shard.parse(text)


def test_a_text_of_a_shard() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"


def queries(run: RunDir, count: int = 40) -> list[str]:
    """Queries in parts of one row; their ids."""
    texts = [f"a cat on chair {n}" for n in range(count)]
    for text in texts:
        run.table("queries").append([{"query_id": query_id(text), "query": text, "split": "dpo"}])
    return [query_id(text) for text in texts]


def test_a_shards_tables_show_its_rows_and_merge_nothing(tmp_path: Path) -> None:
    whole = RunDir(tmp_path)
    ids = queries(whole)
    seen: list[str] = []
    for index in (1, 2, 3):
        run = pickle.loads(pickle.dumps(RunDir(tmp_path, Shard(index, 3))))
        table = pickle.loads(pickle.dumps(run.table("queries")))
        seen += sorted(row["query_id"] for row in table.rows())
        assert table.count() == len(table.keys())
        assert table.compact() == 0
        assert run.root()[0].table("queries").count() == len(ids), "its root is the whole run"
    assert seen == sorted(ids)
    assert len(whole.table("queries").parts()) == len(ids)


def test_a_shard_reads_past_what_a_killed_merge_left(tmp_path: Path) -> None:
    whole = RunDir(tmp_path)
    ids = queries(whole)
    before = {name: whole.read(f"queries/{name}") for name in whole.table("queries").files()}
    whole.table("queries").compact()
    [merged] = whole.table("queries").parts()
    for name, data in before.items():  # it was killed before it deleted them
        whole.write(f"queries/{name}", data)
    whole.write_json(f"queries/{merged}.sources.json", list(before))
    table = RunDir(tmp_path, Shard(1, 1)).table("queries")
    table.clear_merged()
    assert sorted(row["query_id"] for row in table.rows()) == sorted(ids)
    assert len(table.files()) == len(ids) + 2, "the next driver of the whole run deletes them"


def recipe_for(out: Path, *more: str) -> Recipe:
    queries = out.parent / "queries.txt"
    queries.write_text("\n".join(f"a cat on chair {n}" for n in range(12)), "utf-8")
    return load(
        TINY, [f"out={out}", f"queries.path={queries}", "queries.splits={dpo: 1}", f"sft.data={SFT}", *more]
    )


def curated(recipe: Recipe) -> RunDir:
    with opened(recipe) as run:
        phases.curate_queries(recipe, run)
    return run


def test_what_comes_before_the_shards_is_asked_for(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "run")
    with pytest.raises(LoopError, match="has no queries yet: run `vpo curate` once, before the shards"):
        generate_shard(recipe, Shard(1, 2))
    assert not RunDir(recipe.out).exists("recipe.yaml")
    run = curated(recipe)
    with pytest.raises(LoopError, match=r"checkpoints/sft is not trained yet: run `vpo sft` once"):
        generate_shard(recipe, Shard(1, 2), ("sample",))
    run.write_json("checkpoints/sft/vpo.json", {"fingerprint": "of other data"})
    with pytest.raises(LoopError, match="is not trained yet"):
        generate_shard(recipe, Shard(1, 2))
    assert not run.exists("ledger.json")


def test_a_shard_adds_to_what_another_began_with_the_same_engine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "run")
    shard = RunDir(recipe.out, Shard(1, 2))
    monkeypatch.setattr(facts, "short_version", lambda name: "0.28")
    refuse_other_inputs(recipe, RunDir(recipe.out, Shard(2, 2)), ["judge"])
    refuse_other_inputs(recipe, shard, ["judge"])
    monkeypatch.setattr(facts, "short_version", lambda name: "0.29")
    with pytest.raises(OtherInputsError, match=r"vllm: 0.28 -> 0.29\n.*delete .*made_with/judge.json"):
        refuse_other_inputs(recipe, shard, ["judge"])
    refuse_other_inputs(recipe, RunDir(recipe.out), ["judge"])  # it is alone, and there are no rows yet


@pytest.mark.parametrize("text", ["9/8", "half"])
def test_a_shard_that_is_none_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", TINY, "--shard", text])
    assert stop.value.code == 2
    assert f"--shard: {'there is no shard 9/8' if text == '9/8' else repr(text)}" in capsys.readouterr().err


class Judge:
    """A judge that finds fault with the first take of every query, and lets one shard wait half-way."""

    def __init__(self, waiting: Shard, after: int) -> None:
        self.waiting, self.left, self.go_on = waiting, after, threading.Event()
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        text = request["messages"][0]["content"]
        query = json.loads(text.rsplit("<request>", 1)[1].split("</request>")[0])
        if query_id(query) in taken([query_id(query)], self.waiting.of)[self.waiting.index - 1]:
            with self.lock:
                self.left -= 1
            if self.left < 0:
                self.go_on.wait(300)
        if "verdict" not in json.dumps(request["response_format"]):
            return completion({"prompt": f"{query}, refined"})
        fine = "take 0" not in text or "refined" in text
        return completion({"critique": "so", "missing": [], "added": [],
                           "verdict": "aligned" if fine else "imprecise"})  # fmt: skip


def options(server: EndpointServer) -> list[str]:
    endpoint = {"base_url": server.url, "api_key_env": None, "concurrency": 2, "prompt_price": PRICE}
    judge = {"model": "m", "backend": "openai", "endpoint": endpoint, "engine": {"batch_size": 1},
             "pool": {"size": 1, "num_cpus": 0.1}}  # fmt: skip
    return [f"judge={json.dumps(judge)}", "sft=null", "sample.k=2"]


def sampled(recipe: Recipe) -> RunDir:
    """A run whose candidates are there; so no policy is loaded."""
    run = curated(recipe)
    models = Models("nowhere", policy_id(recipe, run))
    rows = CHAINS["generation"].rows_before(recipe, run, models, "sample")
    run.table("candidates").append([{**row, "prompt": f"{row['query']}, take {row['k']}"} for row in rows])
    return run


@contextmanager
def drivers(recipe: Recipe, sets: list[str], *commands: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Commands of `vpo`, each in a process of its own, on the session's cluster; with logs beside the run."""
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = [TINY, *(word for value in sets for word in ("--set", value))]
    processes = []
    try:
        for name, *more in commands:
            command = [sys.executable, "-m", "vpo_ray.cli", name, *given, *more]
            with open(f"{recipe.out}-{'-'.join([name, *more]).replace('/', 'of')}.log", "ab") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(60)


def finished(recipe: Recipe, sets: list[str], *commands: list[str]) -> None:
    with drivers(recipe, sets, *commands) as processes:
        for process, command in zip(processes, commands, strict=True):
            assert process.wait(500) == 0, (command, logs(recipe))


def logs(recipe: Recipe) -> str:
    out = Path(recipe.out)
    found = sorted(out.parent.glob(f"{out.name}-*.log"))
    return "\n".join(f"{path.name}:\n{path.read_text('utf-8')[-2500:]}" for path in found)


def wait_for(recipe: Recipe, table: str, shard: Shard) -> None:
    deadline = time.monotonic() + 400
    while not RunDir(recipe.out, shard).table(table).count():
        assert time.monotonic() < deadline, logs(recipe)
        time.sleep(0.2)


def made(run: RunDir, table: str) -> dict[str, tuple[object, ...]]:
    """What a run computed, by candidate; each is stored once."""
    stored = [key for batch in run.table(table).batches() for key in batch["candidate_id"].to_pylist()]
    assert len(stored) == len(set(stored))
    columns = ("verdict", "refined_prompt", "refined_verdict", "video_key", "error")
    return {row["candidate_id"]: tuple(row[name] for name in columns) for row in run.table(table).rows()}


@pytest.mark.slow
@pytest.mark.ray
def test_a_shard_that_is_killed_and_run_again_beside_another(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    judge = Judge(Shard(1, 2), after=3)
    server = serve_endpoint(judge)
    recipe = recipe_for(tmp_path / "shards", *options(server))
    sets = [f"out={recipe.out}", f"queries.path={recipe.queries.path}", "queries.splits={dpo: 1}"]
    sets += options(server)
    run = sampled(recipe)
    with drivers(recipe, sets, ["judge", "--shard", "1/2"], ["judge", "--shard", "2/2"]) as (first, second):
        wait_for(recipe, "verdicts", Shard(1, 2))
        first.kill()
        first.wait(60)
        judge.go_on.set()
        finished(recipe, sets, ["judge", "--shard", "1/2"])
        assert second.wait(300) == 0, logs(recipe)
    assert "shard 2/2: " in Path(f"{recipe.out}-judge---shard-2of2.log").read_text("utf-8")
    assert len(run.table("verdicts").parts()) == run.table("verdicts").count() == 24
    assert not run.exists("ledger.json")
    asked = len(server.requests)

    finished(recipe, sets, ["judge"])
    assert len(server.requests) == asked, "nothing is left to do"
    assert len(run.table("verdicts").parts()) == 1, "the whole run's driver merges the parts"
    assert run.read_json("ledger.json")["stages"]["judge"]["out"] == 24
    # The two answers that were under way are asked for again; no other is.
    assert len(server.requests) <= 12 * (1 + 3) + 2
    assert endpoint_cost(run) <= PRICE * len(server.requests) / 1000

    one = recipe_for(tmp_path / "one", *options(server))
    whole = sampled(one)
    phases.generate_feedback(one, whole, phases.starting_policy(one, whole), ("judge",))
    assert made(run, "verdicts") == made(whole, "verdicts")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_four_drivers_at_once_make_what_one_driver_makes(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve, tiny_models: Path
) -> None:
    judge = Judge(Shard(2, 4), after=12)
    server = serve_endpoint(judge)
    pools = [f"{key}.pool.num_cpus=0.1" for key in ("render", "reward")]
    models = [f"render.model={tiny_models / 'video'}", f"reward.model={tiny_models / 'reward'}"]
    models += [f"reward.checklist.file={tiny_models / 'reward/checklist.yaml'}"]
    more = [*options(server), *pools, *models, f"policy.model={tiny_models / 'policy'}"]
    recipe = recipe_for(tmp_path / "shards", *more)
    run = sampled(recipe)
    sets = [f"queries.path={recipe.queries.path}", "queries.splits={dpo: 1}", *more]
    own = [f"out={recipe.out}", *sets]
    with drivers(recipe, own, *(["generate", "--shard", f"{n}/4"] for n in (1, 2, 3, 4))) as processes:
        wait_for(recipe, "feedback", Shard(2, 4))
        processes[1].kill()
        processes[1].wait(60)
        judge.go_on.set()
        finished(recipe, own, ["generate", "--shard", "2/4"])
        for index in (0, 2, 3):
            assert processes[index].wait(500) == 0, logs(recipe)
    finished(recipe, own, ["generate"])
    stages = [line for line in reconcile(build_ledger(run, recipe)) if not line.startswith("pair")]
    assert stages == []
    assert run.read_json("ledger.json")["stages"]["score"]["out"] > 0

    one = recipe_for(tmp_path / "one", *more)
    whole = sampled(one)
    finished(one, [f"out={one.out}", *sets], ["generate"])
    rows = made(run, "feedback")
    assert rows == made(whole, "feedback")
    assert Counter((verdict, error) for verdict, *_, error in rows.values()) == {
        ("aligned", None): 12,
        ("imprecise", None): 12,
    }
    assert sum(row["score"] is not None for row in run.table("feedback").rows()) == 12
