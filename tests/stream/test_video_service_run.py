"""A run whose videos come from a service, over HTTP, that renders with the tiny pipeline."""

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from endpoint_server import Reply, Request, VideoServer
from PIL import Image

from vpo_ray.engines.video.engine import VideoEngine, encode
from vpo_ray.engines.video.openai_video import FOLDER
from vpo_ray.files.image_files import decode_image
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.recipe import Recipe, Render, load
from vpo_ray.records import query_id
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream.pipeline import GenerationError, Models, generate
from vpo_ray.stream.spending import endpoint_cost
from vpo_ray.world.tiny import make_image_video

pytestmark = [pytest.mark.engine, pytest.mark.ray]

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
MODELS = Models("nowhere", "test-policy")
PROMPTS = ["a cat", "a dog", "rain", "fire", "a boat", "a bird"]
PRICE = 0.5


@pytest.fixture
def server(tiny_models: Path) -> Iterator[VideoServer]:
    settings = Render(
        model=str(tiny_models / "video"), dtype="float32", steps=1, frames=9, height=32, width=48
    )
    engine, device = VideoEngine(settings), threading.Lock()

    def make(fields: Request) -> bytes:
        with device:
            [frames] = engine.render([fields["prompt"]], [int(fields["seed"])])
        assert not isinstance(frames, Exception)
        return encode(frames, 8, 17)

    made = VideoServer(make, polls=1)
    yield made
    made.close()


def recipe_for(folder: Path, server: VideoServer, models: Path, *more: str) -> Recipe:
    endpoint = {
        "base_url": server.url, "api_key_env": None, "concurrency": 3, "retries": 1, "video_price": PRICE,
        "request": {"size": "48x32", "num_frames": 9},
    }  # fmt: skip
    render = {
        "kind": "openai",
        "model": "tiny",
        "version": "1",
        "endpoint": endpoint,
        "pool": {"num_cpus": 0.1},
    }
    sets = [f"out={folder / 'run'}", f"render={json.dumps(render)}", "sft=null"]
    sets += [f"reward.model={models / 'reward'}", f"reward.checklist.file={models / 'reward/checklist.yaml'}"]
    return load(TINY, [*sets, "limits.max_error_share=1", *more])


def run_of(recipe: Recipe) -> RunDir:
    """A run whose prompts have been judged: two queries, three candidates each."""
    run = RunDir(recipe.out)
    rows = []
    for k, prompt in enumerate(PROMPTS):
        query = f"query {k % 2}"
        key = {"candidate_id": f"{k}" * 32, "query_id": query_id(query), "query": query, "k": k, "seed": 5}
        rows.append({**key, "prompt": prompt, "verdict": "aligned"})
    run.table("verdicts").append(rows)
    return run


def test_a_service_renders_what_is_scored(
    tmp_path: Path, ray_cluster: None, tiny_models: Path, server: VideoServer
) -> None:
    def refuse(what: str, fields: Request) -> Reply | None:
        error = {"code": "moderation_blocked", "message": "not fire"}
        return (
            Reply({"id": "x", "status": "failed", "error": error})
            if fields["prompt"] == "fire" and what == "poll"
            else None
        )

    server.fault = refuse
    recipe = recipe_for(tmp_path, server, tiny_models)
    run = run_of(recipe)
    generate(recipe, run, MODELS, ("render", "score"))
    rows = {row["prompt"]: row for row in run.table("feedback").rows()}
    assert len(rows) == len(server.requests) == 6
    for prompt, row in rows.items():
        if prompt == "fire":
            assert (row["error_stage"], row["error"]) == (
                "render",
                "the service refused the prompt: not fire",
            )
        else:
            assert (row["error"], row["frames"], row["width"], row["height"]) == (None, 9, 48, 32)
            assert row["score"] is not None
    seeds = {fields["prompt"]: fields["seed"] for fields in server.requests}
    assert {
        prompt: str(row["video_seed"]) for prompt, row in rows.items() if row["video_seed"]
    }.items() <= seeds.items()
    assert len(set(seeds.values())) == 2, "candidates of a query share one"
    rendered = build_ledger(run, recipe)["stages"]["render"]
    assert (rendered["requests"], rendered["cost"]) == (5, pytest.approx(5 * PRICE))
    assert endpoint_cost(run) == pytest.approx(5 * PRICE)

    server.fault = lambda what, fields: None
    generate(recipe, run, MODELS, ("render", "score"), retry_errors=True)
    assert len(server.requests) == 7
    assert all(row["error"] is None for row in run.table("feedback").rows())


def test_a_service_renders_from_the_images_of_queries(
    tmp_path: Path, ray_cluster: None, tiny_models: Path
) -> None:
    make_image_video(tmp_path / "animator")
    size = {"frames": 9, "height": 32, "width": 48}
    engine = VideoEngine(
        Render(model=str(tmp_path / "animator"), dtype="float32", steps=1, **size)  # type: ignore[arg-type]
    )
    device = threading.Lock()

    def make(fields: Request) -> bytes:
        _, data, _ = server.files[server.requests.index(fields)]["input_reference"]
        with device:
            [frames] = engine.animate([decode_image(data)], [fields["prompt"]], [int(fields["seed"])])
        assert not isinstance(frames, Exception)
        return encode(frames, 8, 17)

    server = VideoServer(make, polls=1)
    recipe = recipe_for(tmp_path, server, tiny_models)
    run = RunDir(recipe.out)
    names = []
    for k, colour in enumerate(("red", "blue")):
        file = io.BytesIO()
        Image.new("RGB", (90, 70), colour).save(file, "PNG")
        names.append(image := images_of(run).put(file.getvalue()))
        query = query_id("drift", image.removesuffix(".png"))
        key = {"candidate_id": f"{k}" * 32, "query_id": query, "query": "drift", "k": 0, "seed": 5}
        run.table("verdicts").append([{**key, "prompt": "a cat", "verdict": "aligned", "image": image}])
    generate(recipe, run, MODELS, ("render", "score"))
    server.close()
    rows = {row["image"]: row for row in run.table("feedback").rows()}
    assert [rows[name]["error"] for name in names] == [None, None]
    assert len({rows[name]["video_key"] for name in names}) == 2
    sent = [files["input_reference"] for files in server.files]
    assert {(name, kind) for name, _, kind in sent} == {("image.png", "image/png")}
    assert {decode_image(data).size for _, data, _ in sent} == {(48, 32)}
    assert endpoint_cost(run) == pytest.approx(2 * PRICE)


@pytest.mark.slow
def test_a_replica_that_is_killed_pays_for_no_video_twice(
    tmp_path: Path, ray_cluster: None, tiny_models: Path, server: VideoServer
) -> None:
    """Jobs under way are polled by the next replica, and the run's limit holds."""
    killed = threading.Event()

    def wait(what: str, fields: Request) -> Reply | None:
        slow = what == "poll" and len(server.requests) > 3 and not killed.is_set()
        return Reply({"status": "in_progress"}) if slow else None

    server.fault = wait
    recipe = recipe_for(tmp_path, server, tiny_models, f"limits.max_cost={PRICE * len(PROMPTS)}")
    run = run_of(recipe)

    def kept() -> set[str]:
        found = set()
        for path in (tmp_path / "run/videos" / FOLDER).glob("*.json"):
            with suppress(FileNotFoundError):
                found.add(json.loads(path.read_text("utf-8"))["id"])
        return found

    def kill() -> None:
        deadline = time.monotonic() + 120
        # The last three are known on disk, where those before them may still be.
        while (
            len(server.jobs) < 6 or not {*list(server.jobs)[3:]} <= kept()
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "MapBatches(render)" in " ".join(process.cmdline()):
                pids.append(process.pid)
                process.kill()
        killed.set()

    pids: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    generate(recipe, run, MODELS, ("render", "score"))
    killer.join()
    assert len(pids) == 1
    rows = list(run.table("feedback").rows())
    assert [row["error"] for row in rows] == [None] * 6
    asked = Counter(fields["prompt"] for fields in server.requests)
    assert asked == dict.fromkeys(PROMPTS, 1)
    assert endpoint_cost(run) == pytest.approx(PRICE * 6)
    store = VideoStore(run.at("videos"))
    assert {entry.key for entry in store.entries()} == {row["video_key"] for row in rows}
    assert list((tmp_path / "run/videos" / FOLDER).glob("*.json")) == []

    # Another run with this store, and the same model at another address, asks for nothing.
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    again = recipe_for(tmp_path / "again", server, tiny_models, f"render.store={run.at('videos')}",
                       f"render.endpoint.base_url={elsewhere}")  # fmt: skip
    generate(again, other := run_of(again), MODELS, ("render", "score"))
    assert {row["video_key"] for row in other.table("feedback").rows()} == {row["video_key"] for row in rows}
    assert len(server.requests) == 6
    assert endpoint_cost(other) == 0


def test_the_limit_of_cost_stops_a_run_before_it_is_passed(
    tmp_path: Path, ray_cluster: None, tiny_models: Path, server: VideoServer
) -> None:
    recipe = recipe_for(tmp_path, server, tiny_models, f"limits.max_cost={PRICE * 4}")
    run = run_of(recipe)
    with pytest.raises(GenerationError, match=r"limits.max_cost 2 is reached"):
        generate(recipe, run, MODELS, ("render",))
    assert len(server.requests) == 4
    assert endpoint_cost(run) == pytest.approx(PRICE * 4)
    more = recipe_for(tmp_path, server, tiny_models, "limits.max_cost=100")
    generate(more, run, MODELS, ("render",))
    assert len(server.requests) == 6, "nothing that was paid is asked for again"
    assert endpoint_cost(run) == pytest.approx(PRICE * 6)
