"""Prompts that evolve with real videos; the LLM is a server here, which answers by what it is shown."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from endpoint_server import EndpointServer, Reply, Request, completion, failure
from PIL import Image

import vpo_ray
from vpo_ray import cli
from vpo_ray.files.image_files import image_name
from vpo_ray.loop.evolution import Evolving, evolve_prompts
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id
from vpo_ray.storage.run_dir import EVOLUTION_ASKED, EVOLUTION_SCORED, RunDir
from vpo_ray.storage.sft_data import evolved_rows
from vpo_ray.storage.videos import VideoStore
from vpo_ray.world import tiny

pytestmark = [pytest.mark.ray, pytest.mark.engine]

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "jobs/recipes/tiny.yaml")
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
QUERIES = ["a cat", "a dog"]
LIGHT = ["in soft light", "at night in the rain", "under a red sky, slowly", "in deep snow, wide angle"]


def texts_of(text: str, tag: str) -> list[str]:
    return [json.loads(found) for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text)]


def answer(request: Request) -> Reply:
    """Writes two prompts: one that names how many it was shown, and one that repeats the best so far. A judge
    that finds every prompt unsafe that was written in the snow."""
    text = request["messages"][0]["content"]
    (query,) = texts_of(text, "request")
    if "verdict" in json.dumps(request["response_format"]):
        verdict = "unsafe" if "snow" in texts_of(text, "prompt")[0] else "aligned"
        return completion({"critique": "so", "missing": [], "added": [], "verdict": verdict})
    tried = texts_of(text, "prompt")
    return completion({"prompts": [f"{query.capitalize()} {LIGHT[len(tried)]}.", tried[-1]]})


def recipe_for(folder: Path, tiny_models: Path, server: EndpointServer, *more: str) -> Recipe:
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "timeout_s": 20}
    judge = {"model": "m", "backend": "openai", "endpoint": endpoint, "engine": {"batch_size": 4},
             "pool": {"size": 1, "num_cpus": 0.1}}  # fmt: skip
    reward = {"kind": "vbench", "dimensions": ["temporal_flickering", "dynamic_degree"]}
    sets = [
        f"out={folder / 'run'}", f"judge={json.dumps(judge)}", f"reward={json.dumps(reward)}",
        f"render.model={tiny_models / 'video'}", f"policy.model={tiny_models / 'policy'}", "sft.data=evolved",
        "render.pool.num_cpus=0.1", "reward.pool.num_cpus=0.1", "pair.dominance=none",
        "evolve={prompts: 2, rounds: 2, patience: null}",
    ]  # fmt: skip
    return load(TINY, [*sets, *more])


def run_of(recipe: Recipe, *queries: str) -> RunDir:
    run = open_run(recipe)
    rows = [{"query_id": query_id(q), "query": q, "source": "t", "split": "sft"} for q in queries]
    run.table("queries").append(rows)
    return run


def rows_of(run: RunDir) -> dict[str, Row]:
    return {row["prompt_id"]: row for row in run.table("evolutions").rows()}


@pytest.mark.slow
def test_a_small_evolution(
    tmp_path: Path, tiny_models: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    server = serve_endpoint(answer)
    recipe = recipe_for(tmp_path, tiny_models, server, "evolve.rounds=1")
    run = run_of(recipe, *QUERIES)
    Evolving(recipe, run).run_all()
    rows = rows_of(run)
    for query in QUERIES:
        found = sorted((row for row in rows.values() if row["query"] == query), key=lambda row: row["k"])
        own, first, repeated = found
        assert [row["round"] for row in found] == [0, 1, 1]
        assert (own["prompt"], own["verdict"], own["ended"]) == (query, "aligned", "all rounds")
        assert repeated["skipped"] == "duplicate"
        assert first["prompt"] == f"{query.capitalize()} at night in the rain."
        assert first["parent_ids"] == [own["prompt_id"]]
        scored = [own, first]
        assert own["video_key"] != first["video_key"]
        assert len({row["seed"] for row in scored}) == 1, "noise is no rival"
        for row in scored:
            assert row["fitness"] == row["score"]
            assert {part["name"] for part in row["dimensions"]} == {
                "reward",
                "reward.temporal_flickering",
                "reward.dynamic_degree",
            }
            assert VideoStore(run.at("videos")).has(row["video_key"])
        best = max(scored, key=lambda row: row["fitness"])
        assert [row["prompt_id"] for row in found if row["target"]] == (
            [] if best is own else [best["prompt_id"]]
        )
    targets = len(list(evolved_rows(run)))

    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    evolved = ledger["stages"]["evolve"]
    assert (evolved["in"], evolved["out"], evolved["rounds"], evolved["prompts"]) == (2, targets, 2, 4)
    assert (evolved["videos"], evolved["not_rendered"]) == (4, {"duplicate": 2})
    asked = len(server.requests)
    assert asked == 2 + 2, "what is not rendered is not judged either"
    Evolving(recipe, run).run_all()
    assert (rows_of(run), len(server.requests)) == (rows, asked), "a second call does nothing"


@pytest.mark.slow
def test_an_llm_that_is_down_is_counted(
    tmp_path: Path, tiny_models: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    server = serve_endpoint(lambda request: failure(500, "out of order"))
    recipe = recipe_for(tmp_path, tiny_models, server)
    run = run_of(recipe, *QUERIES)
    with pytest.raises(LoopError, match=r"no evolved prompt is fit(.*\n)+.*2 prompts failed at evolve"):
        evolve_prompts(recipe, run)
    rows = list(rows_of(run).values())
    assert Counter(row["ended"] for row in rows if row["round"] == 0) == {"the LLM gave no answer": 2}
    assert all("out of order" in row["error"] for row in rows if row["round"] == 1)
    assert len([row for row in rows if row["video_key"]]) == 2, "the queries' own"
    server.reply = answer
    Evolving(recipe, run).run_all(retry_errors=True)
    again = list(rows_of(run).values())
    assert len(again) == 2 * 5
    assert all(row["error"] is None for row in again)


@pytest.mark.slow
def test_one_query_now_and_once(
    tmp_path: Path,
    tiny_models: Path,
    ray_cluster: None,
    serve_endpoint: Serve,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve_endpoint(answer)
    recipe = recipe_for(tmp_path, tiny_models, server, "evolve.rounds=3")
    monkeypatch.setattr("vpo_ray.plan.check_recipe", lambda recipe: None)  # it would make the reward first
    found = vpo_ray.refine(recipe, "a fox\r\n", budget=3)
    assert (found.query, found.videos, found.ended) == ("a fox", 3, "budget of videos")
    best = max((row for row in found.trace if row["fitness"] is not None), key=lambda row: row["fitness"])
    assert found.prompt == best["prompt"]
    asked = len(server.requests)
    again = vpo_ray.refine(recipe, "a fox", budget=3)
    assert (again, len(server.requests)) == (found, asked), "it is read"
    assert not RunDir(recipe.out).exists("recipe.yaml"), "the run of the recipe is another"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()), "utf-8")
    assert cli.main(["refine", "a fox", "--recipe", str(path), "--budget", "3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == found.prompt
    assert "3 videos; ended: budget of videos" in out
    assert cli.main(["refine", "a fox", "--recipe", str(path), "--budget", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in shown["trace"]] == [row["prompt"] for row in found.trace]
    assert len(server.requests) == asked
    assert cli.main(["refine", " ", "--recipe", str(path)]) == 1
    assert "the query is empty" in capsys.readouterr().err


def vpo(command: str, path: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "vpo_ray.cli", command, str(path), "--out", str(out)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_round_and_learnt(tmp_path: Path, tiny_models: Path, serve_endpoint: Serve) -> None:
    """The commands, killed once among the prompts and once among the videos of each round, and SFT behind."""
    server = serve_endpoint(answer)
    (tmp_path / "queries.txt").write_text("\n".join(f"a cat, number {n}" for n in range(6)), "utf-8")
    recipe = recipe_for(
        tmp_path,
        tiny_models,
        server,
        f"queries={{path: {tmp_path / 'queries.txt'}, splits: {{sft: 1, dpo: 0}}}}",
        "sft.epochs=1",
        "sft.workers=1",
        "evolve.fitness={reward: -1}",  # by these random weights, queries as they are move least
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()), "utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        subprocess.run(vpo("curate", path, out), check=True, cwd=ROOT, timeout=300)
    subprocess.run(vpo("evolve", path, whole), check=True, cwd=ROOT, timeout=600)
    stops = [(folder, number) for number in (1, 3) for folder in (EVOLUTION_SCORED, EVOLUTION_ASKED)]
    for folder, number in stops:
        table = killed / folder / ("offspring" if folder == EVOLUTION_ASKED else "feedback")
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(
                vpo("evolve", path, killed), stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        deadline = time.monotonic() + 600
        while len(list(table.glob("*.parquet"))) < number and process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")[-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    asked = len(server.requests)
    subprocess.run(vpo("evolve", path, killed), check=True, cwd=ROOT, timeout=600)
    assert len(server.requests) > asked, "something was left to do"

    def rows(out: Path) -> list[Row]:
        found = rows_of(RunDir(out))
        return [{**row, "video_uri": None} for _, row in sorted(found.items())]

    assert rows(killed) == rows(whole)
    done = subprocess.run(vpo("sft", path, killed), cwd=ROOT, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    learnt = {(row["query"], row["prompt"]) for row in RunDir(killed).table("sft").rows()}
    assert learnt == {(row["query"], row["prompt"]) for row in rows(whole) if row["target"]}
    assert (killed / "checkpoints/sft/model.safetensors").is_file()


@pytest.mark.slow
def test_one_query_with_its_image(
    tmp_path: Path,
    tiny_models: Path,
    ray_cluster: None,
    serve_endpoint: Serve,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is tried of a query with an image: on an image-to-video model, before LLMs that see."""

    def seen(request: Request) -> Reply:
        content = request["messages"][0]["content"]
        shown.append(content[0]["image_url"]["url"])
        request["messages"][0]["content"] = content[-1]["text"]
        return answer(request)

    shown: list[str] = []
    server = serve_endpoint(seen)
    tiny.make_image_video(tmp_path / "image_video")
    size = ("render.frames=9", "render.height=32", "render.width=48", "evolve.rounds=1")
    recipe = recipe_for(tmp_path, tiny_models, server, f"render.model={tmp_path / 'image_video'}", *size)
    monkeypatch.setattr("vpo_ray.plan.check_recipe", lambda recipe: None)  # it would make the reward first
    found = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{colour}.png")
        found[colour] = vpo_ray.refine(recipe, "a fox", image=str(tmp_path / f"{colour}.png"), budget=2)
    red, blue = found["red"], found["blue"]
    assert red.folder != blue.folder
    assert (red.videos, blue.videos) == (2, 2)
    assert red.trace[0]["video_uri"] != blue.trace[0]["video_uri"]
    names = {row["image"] for row in red.trace}
    assert names == {image_name((tmp_path / "red.png").read_bytes())}
    assert len(set(shown)) == 2
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()), "utf-8")
    asked = ["refine", "a fox", "--recipe", str(path), "--budget", "2", "--json"]
    requests = len(server.requests)
    assert cli.main([*asked, "--image", str(tmp_path / "red.png")]) == 0
    assert json.loads(capsys.readouterr().out)["image"] in names
    assert len(server.requests) == requests, "it is read"
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    for more, told in (
        ([], "give the query's (vpo refine --image FILE)"),
        (["--image", str(tmp_path / "gone.png")], "No such file"),
        (["--image", str(tmp_path / "cut.png")], "no PNG, JPEG or WebP"),
    ):
        assert cli.main([*asked, *more]) == 1
        assert told in capsys.readouterr().err
    plain = recipe_for(tmp_path / "plain", tiny_models, server)
    with pytest.raises(LoopError, match="makes videos from text alone; leave the image out"):
        vpo_ray.refine(plain, "a fox", image=str(tmp_path / "red.png"), budget=2)
