"""`/v1/videos`: a query in, a video out, on the tiny models; and what a job survives."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny_endpoint import SETTINGS, TINY

from vpo_ray.engines.reward.frames import read_frames
from vpo_ray.files.folder import StorageError
from vpo_ray.recipe import RecipeError, load, load_serve
from vpo_ray.serve.app import video_app
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.keys import make_key
from vpo_ray.serve.video_jobs import JobFolder, StoredJob, VideoJobs, parse_video


def job(**more: Any) -> StoredJob:
    fields = {"id": "video1", "model": "vpo", "query": "a cat", "seed": 0, "created_at": 1, "owner": "web"}
    return StoredJob(**{**fields, **more})


def test_jobs_are_kept_apart_until_they_end(tmp_path: Path) -> None:
    jobs = JobFolder(str(tmp_path))
    jobs.write(job())
    jobs.write(job(id="video0", created_at=0, status="in_progress"))
    assert [left.id for left in jobs.unfinished()] == ["video0", "video1"]
    jobs.write(job(status="completed", completed_at=2))
    assert [left.id for left in jobs.unfinished()] == ["video0"]
    found = jobs.read("video1")
    assert found is not None
    assert (found.status, found.owner) == ("completed", "web")
    assert not hasattr(found.shown(), "owner")
    for name in ("none", "../video1", "open/video0", "", "é"):
        assert jobs.read(name) is None


def test_a_replica_that_asks_a_service_takes_as_many_jobs_as_that_may_have(tmp_path: Path) -> None:
    service = "serve.videos.render={kind: openai, model: m, endpoint: {concurrency: 9}}"
    for given, calls in (("seed=7", 2), (service, 9)):
        settings = load_serve(str(TINY), [f"serve.videos={{store: {tmp_path}, score: false}}", given])
        jobs = video_app(None, None, settings, ())
        renderer = jobs._bound_deployment.init_args[2]._bound_deployment
        assert renderer.max_ongoing_requests == calls


DAMAGE = {
    "videoempty": b"",
    "videocut": b'{"id": "vid',
    "videobytes": b"\xff\xfe",
    "videolist": b"[]",
    "videoother": b'{"length": 3, "sha256": "0"}',
    "videoname": job(id="videoanother").model_dump_json().encode(),
    "videodeep": b"[" * 100_000,
}


def test_a_file_that_is_no_job_stops_no_other(tmp_path: Path) -> None:
    jobs = JobFolder(str(tmp_path))
    jobs.write(job())
    for name, data in DAMAGE.items():
        jobs.folder.write(f"open/{name}.json", data)
    jobs.folder.write("open/sub/video3.json", b"{}")
    (tmp_path / "jobs/open/videofolder.json").mkdir()
    assert [left.id for left in jobs.unfinished()] == ["video1"]
    for name in DAMAGE:
        assert jobs.read(name) is None
    jobs.folder.write("video1.json", b"{")
    assert jobs.read("video1") == job()


def test_a_burst_gets_no_more_places_than_there_are(tmp_path: Path) -> None:
    """All ask before the first job is in the store."""
    held = threading.Event()

    class Slow(JobFolder):
        def write(self, job: StoredJob) -> None:
            assert held.wait(20)
            if job.query == "full":
                raise StorageError("no space left")
            super().write(job)

    jobs = object.__new__(VideoJobs)
    jobs.settings, jobs.jobs, jobs.max_waiting, jobs.tasks = SETTINGS, Slow(str(tmp_path)), 3, set()

    async def make(job: StoredJob) -> None:
        await asyncio.sleep(0.2)

    async def burst() -> list[str | None]:
        jobs._make = make  # type: ignore[method-assign]
        asked = [asyncio.create_task(jobs.submit("a cat", n, "web")) for n in range(10)]
        await asyncio.sleep(0.1)
        held.set()
        answers = await asyncio.gather(*asked)
        await asyncio.gather(*jobs.tasks)
        with pytest.raises(StorageError, match="no space"):
            await jobs.submit("full", 0, "web")
        await asyncio.sleep(0)
        assert not jobs.tasks, "it holds no place"
        return answers

    answers = asyncio.run(burst())
    assert sum(answer is not None for answer in answers) == 3
    assert len(jobs.jobs.folder.files()) == 3


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{}", 422),
        (b'{"query": "a", "prompt": " "}', 400),
        (b'{"query": " ", "prompt": "b"}', 400),
        (b'{"query": "a", "prompt": "%s"}' % (b"b" * 8001), 422),
        (b'{"query": "a", "seed": -1}', 422),
        (b'{"query": " "}', 400),
        (b'{"query": "a", "model": "other"}', 404),
        (b'{"prompt": "a", "input_reference": {"image_url": "data:image/png;base64,AAAA"}}', 422),
        (b'{"prompt": "a", "image_url": {"url": "data:image/png;base64,AAAA"}}', 422),
    ],
)
def test_a_bad_request_for_a_video(raw: bytes, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        parse_video(raw, SETTINGS)
    assert refused.value.status == status
    assert parse_video(b'{"prompt": "a cat", "seed": 3}', SETTINGS) == ("a cat", None, 3, None)
    assert parse_video(b'{"query": "a cat", "prompt": "A cat."}', SETTINGS) == ("a cat", "A cat.", 0, None)


def test_the_recipes_own_models_make_the_videos(tmp_path: Path) -> None:
    settings = load_serve(str(TINY), [f"serve.videos.store={tmp_path}"])
    recipe = load(TINY)
    assert settings.videos is not None
    assert settings.videos.render == recipe.render
    assert settings.videos.reward == recipe.reward
    from vpo_ray.serve.app import ingress_app

    with pytest.raises(RecipeError, match=r"serve\.videos\.render is missing"):
        ingress_app(None, None, load_serve(None, [f"serve.videos.store={tmp_path}"]), ())


def finished(where: str, made: str, headers: dict[str, str]) -> dict[str, Any]:
    end = time.monotonic() + 120
    while True:
        found: dict[str, Any] = httpx.get(f"{where}/videos/{made}", headers=headers).json()
        if found["status"] in ("completed", "failed"):
            return found
        assert time.monotonic() < end, found
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_a_query_becomes_a_video(
    endpoint: Callable[..., str], tiny_models: Path, tiny_sets: list[str], tmp_path: Path
) -> None:
    recipe = load(TINY, [part for part in tiny_sets if part != "--set"])
    (mine, line), (other, other_line) = make_key("mine"), make_key("other")
    (tmp_path / "keys").write_text(f"{line}\n{other_line}\n", "utf-8")
    (tmp_path / "words").write_text("knife\n", "utf-8")
    # What a replica that died has left: the next one finishes it.
    JobFolder(str(tmp_path / "store")).write(job(id="videoleft", owner="mine", status="in_progress"))
    videos = {
        "store": str(tmp_path / "store"),
        "render": recipe.render,
        "reward": recipe.reward,
        "score": True,
    }
    safety = {"query": "refuse", "keywords": str(tmp_path / "words")}
    where = endpoint("films", keys=str(tmp_path / "keys"), videos=videos, safety=safety)
    headers = {"Authorization": f"Bearer {mine}"}
    reply = httpx.post(f"{where}/videos", json={"query": "a cat", "seed": 4}, headers=headers)
    assert reply.status_code == 202, reply.text
    made = reply.json()
    assert (made["object"], made["status"], made["query"]) == ("video", "queued", "a cat")
    early = httpx.get(f"{where}/videos/{made['id']}/content", headers=headers)
    assert (early.status_code, early.json()["error"]["code"]) in {(409, "video_not_ready"), (200, None)}
    found = finished(where, made["id"], headers)
    assert found["status"] == "completed", found
    assert found["prompt"] != "a cat"
    assert isinstance(found["video"]["score"], float)
    content = httpx.get(f"{where}/videos/{made['id']}/content", headers=headers)
    assert content.headers["content-type"] == "video/mp4"
    assert (
        len(read_frames(content.content, lambda times, fps: list(range(len(times)))))
        == found["video"]["frames"]
    )
    client = openai.OpenAI(base_url=where, api_key=mine, max_retries=0)
    theirs = client.videos.create(prompt="a cat", extra_body={"seed": "4"})
    assert finished(where, theirs.id, headers)["video"]["key"] == found["video"]["key"]
    assert client.videos.retrieve(theirs.id).status == "completed"
    assert client.videos.download_content(theirs.id).read() == content.content
    # The same query and seed is the same video, which is not rendered twice; another seed is another.
    again = httpx.post(f"{where}/videos", json={"query": "a cat", "seed": 4}, headers=headers).json()
    assert finished(where, again["id"], headers)["video"]["key"] == found["video"]["key"]
    assert finished(where, "videoleft", headers)["video"]["key"] != found["video"]["key"]
    # The query's own video, beside it: the text as it is, another video.
    given = {"query": "a cat", "prompt": "a cat --ar 16:9", "seed": 4}
    raw = httpx.post(f"{where}/videos", json=given, headers=headers).json()
    plain = finished(where, raw["id"], headers)
    assert (plain["status"], plain["prompt"], plain["fallback"]) == ("completed", "a cat", False)
    assert plain["video"]["key"] != found["video"]["key"]
    for body in ({"query": "a knife"}, {"query": "a cat", "prompt": "A knife."}):
        refused = httpx.post(f"{where}/videos", json=body, headers=headers).json()
        told = finished(where, refused["id"], headers)
        assert (told["status"], told["error"]["code"]) == ("failed", "content_filter")
    # A video belongs to who asked for it.
    strange = {"Authorization": f"Bearer {other}"}
    for path in (made["id"], f"{made['id']}/content", "videonone"):
        assert httpx.get(f"{where}/videos/{path}", headers=strange).status_code == 404
