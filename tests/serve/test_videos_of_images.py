"""Videos of a query with an image, while serving: on a tiny image-to-video model. An LLM is a server here."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion
from pictures import picture, uri
from test_refinements import Replica, done, jobs_for, settings_for

from vpo_ray.recipe import Serve
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.images import AttachedImage, film_images, keep_image, read_image
from vpo_ray.serve.optimize_schema import parse_optimize
from vpo_ray.serve.refinements import RefinementJobs
from vpo_ray.serve.video_jobs import StoredJob, VideoJobs, VideoRenderer, parse_video
from vpo_ray.storage.videos import VideoStore
from vpo_ray.world.tiny import make_image_video

Start = Callable[[Callable[[Request], Reply]], EndpointServer]
RED, BLUE = picture("red"), picture("blue")


@pytest.fixture(scope="module")
def animator(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "image_video"
    make_image_video(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process outlives its replicas."""
    for module in ("refinements", "video_jobs"):
        monkeypatch.setattr(f"vpo_ray.serve.{module}.bind_worker", lambda: None)


def served(folder: Path, models: Path, server: EndpointServer | None, animator: str) -> Serve:
    size = ("render.frames=9", "render.height=32", "render.width=48")
    return settings_for(folder, models, server, f"render.model={animator}", *size)


async def kept(settings: Serve, data: bytes) -> str:
    name = await keep_image(settings, read_image(AttachedImage(uri(data), "image")))
    assert name is not None
    return name


def body(**fields: Any) -> bytes:
    return json.dumps({"query": "a fox", **fields}).encode()


def test_what_the_video_model_takes_is_asked_for(tmp_path: Path, tiny_models: Path, animator: str) -> None:
    moving, plain = served(tmp_path, tiny_models, None, animator), settings_for(tmp_path, tiny_models, None)
    asked = parse_video(body(image=uri(RED)), moving)
    assert asked.image == AttachedImage(uri(RED), "image")
    found = parse_optimize(body(image=uri(RED), effort="videos"), moving)
    assert found.images == [AttachedImage(uri(RED), "image")]
    for parse, more in ((parse_video, {}), (parse_optimize, {"effort": "videos"})):
        with pytest.raises(ApiError, match="makes videos from images: send one") as refused:
            parse(body(**more), moving)
        assert refused.value.code == "image_required"
        with pytest.raises(ApiError, match="takes no images") as refused:
            parse(body(image=uri(RED), **more), plain)
        assert (refused.value.status, refused.value.code) == (400, "images_not_supported")
    elsewhere = settings_for(tmp_path, tiny_models, None, "render.model=hub/unknown")
    assert parse_video(body(image=uri(RED)), elsewhere).image is not None
    assert parse_video(body(), elsewhere).image is None
    with pytest.raises(ApiError, match="sees no images"):
        parse_optimize(body(image=uri(RED)), moving)


@pytest.mark.engine
def test_a_video_begins_with_the_image_of_its_query(tmp_path: Path, tiny_models: Path, animator: str) -> None:
    settings = served(tmp_path, tiny_models, None, animator)
    assert settings.videos is not None
    assert settings.videos.render is not None
    renderer = Replica(VideoRenderer(settings.videos.render, settings.videos.store))

    async def made(jobs: VideoJobs, image: str) -> StoredJob:
        job = json.loads(await jobs.submit("a fox", 1, "mine", "A fox runs.", image) or "")
        assert job["image"] == image
        async with asyncio.timeout(120):
            await asyncio.gather(*jobs.tasks)
        found = jobs.jobs.read(job["id"])
        assert found is not None
        return found

    async def ask() -> list[StoredJob]:
        jobs = VideoJobs(None, None, renderer, None, settings, ())  # type: ignore[arg-type]
        names = [await kept(settings, data) for data in (RED, BLUE, RED)]
        return [await made(jobs, name) for name in [*names, f"{'0' * 64}.png"]]

    red, blue, again, gone = asyncio.run(ask())
    assert [job.status for job in (red, blue, again)] == ["completed"] * 3, red.error
    assert red.video is not None
    assert blue.video is not None
    assert red.video == again.video
    assert red.video.key != blue.video.key
    store = VideoStore(settings.videos.store)
    assert store.read(red.video.key) != store.read(blue.video.key)
    assert gone.status == "failed"


@pytest.mark.engine
def test_prompts_evolve_with_the_image_in_sight(
    tmp_path: Path, tiny_models: Path, animator: str, serve_endpoint: Start
) -> None:
    def answer(request: Request) -> Reply:
        if "verdict" in json.dumps(request["response_format"]):
            return completion({"critique": "so", "missing": [], "added": [], "verdict": "aligned"})
        number = len(server.requests)
        return completion({"prompts": [f"A fox, take {number}.", f"A red fox, take {number}."]})

    server = serve_endpoint(answer)
    settings = served(tmp_path, tiny_models, server, animator)

    async def ask() -> tuple[Any, Any]:
        jobs: RefinementJobs = jobs_for(settings)
        found = []
        for data in (RED, BLUE):
            image = await kept(settings, data)
            name = json.loads(await jobs.submit("a fox", [], 2, "mine", image) or "")["id"]
            found.append(await done(jobs, name))
        return found[0], found[1]

    red, blue = asyncio.run(ask())
    assert (red.status, blue.status) == ("completed", "completed"), red.error
    assert red.id != blue.id
    assert red.image != blue.image
    shown = [request["messages"][-1]["content"][0]["image_url"]["url"] for request in server.requests]
    assert set(shown) == {uri(RED), uri(BLUE)}
    assert film_images(settings).read(red.image) == RED
