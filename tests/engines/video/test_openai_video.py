"""Videos of a service, over real HTTP, from a server that fails on purpose."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Reply, Request, VideoServer, failure
from PIL import Image

from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.engines.endpoint.account import Account, CostLimitReached
from vpo_ray.engines.endpoint.client import EndpointError
from vpo_ray.engines.video import RenderError, openai_video
from vpo_ray.engines.video.openai_video import FOLDER, VideoService, prepare
from vpo_ray.files.folder import StorageError
from vpo_ray.files.image_files import data_uri, decode_image, image_name
from vpo_ray.recipe import Render
from vpo_ray.records import FEEDBACK, Row, table
from vpo_ray.stages.render import Renderer
from vpo_ray.storage.images import ImageStore
from vpo_ray.storage.videos import VideoStore

Clip = Callable[..., bytes]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(openai_video, "MIN_POLL_S", 0.01)


opened: list[VideoService] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


@pytest.fixture
def server(clip: Clip) -> Iterator[VideoServer]:
    made = VideoServer(lambda fields: clip(len(fields["prompt"])))
    yield made
    made.close()


def settings_of(server: VideoServer, folder: Path, **more: Any) -> Render:
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 2, **more.pop("endpoint", {})}
    fields = {"kind": "openai", "model": "wan", "endpoint": endpoint, "store": str(folder), **more}
    return Render.model_validate(fields)


def service_of(
    server: VideoServer, folder: Path, account: Account | None = None, **more: Any
) -> VideoService:
    model = prepare(settings_of(server, folder, **more), account).load()
    assert isinstance(model, VideoService)
    opened.append(model)
    return model


def candidate(prompt: str, query: str = "q") -> Row:
    row = {"candidate_id": f"{query}-{prompt}", "query_id": query, "query": "a query", "k": 0, "seed": 5}
    return {**row, "prompt": prompt, "verdict": "aligned"}


def kept(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*"))


def once(reply: Reply, where: str = "create") -> Callable[[str, Request], Reply | None]:
    """Send this the first time, and the right thing from then on."""
    left = [reply]
    return lambda what, fields: left.pop() if what == where and left else None


def test_a_service_renders_what_it_is_asked_for(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    request = {"size": "96x64", "seconds": 2, "fancy": True}
    service = service_of(server, tmp_path, endpoint={"request": request})
    prompts = ["a cat", "ein großer 🐕"]
    assert service.render(prompts, [3, 4]) == [clip(len(prompt)) for prompt in prompts]
    asked = sorted(server.requests, key=lambda fields: fields["seed"])
    common = {"model": "wan", "size": "96x64", "seconds": "2", "fancy": "true"}
    assert asked == [
        {**common, "prompt": prompt, "seed": str(seed)} for prompt, seed in zip(prompts, (3, 4), strict=True)
    ], "a form has text only"
    assert set(server.seen.values()) == {server.polls}


def test_a_request_may_be_json_and_leave_the_seed_out(server: VideoServer, tmp_path: Path) -> None:
    endpoint = {"form": False, "request": {"seed": None, "duration": 4}}
    service_of(server, tmp_path, endpoint=endpoint).render(["a cat"], [3])
    assert server.requests == [{"model": "wan", "prompt": "a cat", "duration": 4}]


@pytest.mark.parametrize(
    "fault",
    [failure(429, "slow down", retry_after="0.01"), failure(500), Reply(fault="cut"), Reply("<html>")],
    ids=["429", "500", "cut", "no json"],
)
@pytest.mark.parametrize("what", ["create", "poll", "content"])
def test_what_passes_is_tried_again(
    what: str, fault: Reply, server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    server.fault = once(fault, what)
    assert service_of(server, tmp_path).render(["a cat"], [3]) == [clip(5)]
    assert len(server.jobs) == 1
    keys = {headers["idempotency-key"] for headers in server.seen_headers}
    assert len(keys) == 1, "a service that knows such keys makes no second job for a lost answer"


@pytest.mark.parametrize("half", [True, False])
def test_content_that_was_cut_short_is_fetched_again(
    half: bool, server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    whole = clip(5)
    server.fault = once(Reply(whole, fault="half") if half else Reply(whole[:-200]), "content")
    assert service_of(server, tmp_path).render(["a cat"], [3]) == [whole]
    assert len(server.jobs) == 1


def test_content_that_is_no_video_is_the_rows_error(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    server.make = lambda fields: b"sorry" if fields["prompt"] == "a cat" else clip(5)
    account = Account()
    service = service_of(server, tmp_path, account, endpoint={"video_price": 0.5})
    bad, good = service.render(["a cat", "a dog"], [3, 4])
    assert isinstance(bad, RenderError)
    assert "no whole video" in str(bad)
    assert good == clip(5)
    assert account.spent == 1.0, "it was made and is paid, whatever it is"


def test_a_refused_prompt_is_its_rows_error_and_no_retry(
    server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    def fault(what: str, fields: Request) -> Reply | None:
        if fields["prompt"] == "rude" and what == "create":
            return failure(400, "Your request was blocked by our moderation system", "moderation_blocked")
        if fields["prompt"] == "ruder" and what == "poll":
            error = {"code": "moderation_blocked", "message": "not this one"}
            return Reply({"id": "x", "status": "failed", "error": error})
        if fields["prompt"] == "unlucky" and what == "poll":
            return Reply({"id": "x", "status": "failed", "error": {"code": "internal", "message": "oom"}})
        return None

    server.fault = fault
    account = Account()
    service = service_of(server, tmp_path, account, endpoint={"video_price": 1})
    made = service.render(["rude", "ruder", "unlucky", "a cat"], range(4))
    assert [isinstance(one, RenderError) for one in made] == [True, True, True, False]
    assert "refused the prompt: render.endpoint: Error code: 400 - Your request was blocked" in str(made[0])
    assert str(made[1]) == "the service refused the prompt: not this one"
    assert str(made[2]) == "the job failed: oom"
    assert len(server.requests) == 4
    assert account.spent == 1, "what failed is not paid"
    assert len(kept(tmp_path)) == 1, "and another run creates it anew"


@pytest.mark.parametrize(("status", "ends"), [("DONE", True), ("ready", True), ("Aborted", False)])
def test_services_call_the_end_of_a_job_differently(
    server: VideoServer, tmp_path: Path, clip: Clip, status: str, ends: bool
) -> None:
    server.fault = lambda what, _: Reply({"id": "x", "status": status}) if what == "poll" else None
    (made,) = service_of(server, tmp_path, Account()).render(["a cat"], [3])
    assert made == clip(5) if ends else str(made) == f"the job failed: {status.lower()}"


def test_a_lost_job_is_created_again_a_few_times(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    def lose(what: str, fields: Request) -> Reply | None:
        if what == "poll" and len(server.requests) <= left:
            server.jobs.clear()
        return None

    server.fault = lose
    left, account = 2, Account()
    service = service_of(server, tmp_path, account, endpoint={"video_price": 1})
    assert service.render(["a cat"], [3]) == [clip(5)]
    assert (len(server.requests), account.spent) == (3, 1)
    left = 100
    [error] = service.render(["a dog"], [3])
    assert "lost 3 jobs" in str(error)
    assert len(server.requests) == 6


def test_content_that_is_not_there_is_no_lost_job(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    """A service with another route for it would be paid for one job after the other."""
    server.fault = lambda what, _: failure(404) if what == "content" else None
    account = Account()
    service = service_of(server, tmp_path, account, endpoint={"video_price": 1})
    with pytest.raises(EndpointError, match="is completed, and nothing is at /videos/video_1/content"):
        service.render(["a cat"], [3])
    assert (len(server.requests), account.spent) == (1, 1)
    server.fault = lambda what, _: None
    assert service.render(["a cat"], [3]) == [clip(5)], "it is asked for again"
    server.fault = lambda what, _: failure(404) if what == "content" else None
    [error] = service.render(["a dog"], [3])
    assert isinstance(error, RenderError)
    assert "is no whole video: 404" in str(error)
    assert (len(server.requests), account.spent) == (2, 2)


def test_a_video_that_expired_since_an_earlier_run_is_made_again(
    server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    server.fault = lambda what, _: failure(401) if what == "content" else None
    with pytest.raises(EndpointError):
        service_of(server, tmp_path).render(["a cat"], [3])
    first = set(server.jobs)
    expired = [failure(404)] * openai_video.LOST_AFTER
    server.fault = lambda what, _: expired.pop() if what == "content" and expired else None
    assert service_of(server, tmp_path).render(["a cat"], [3]) == [clip(5)]
    assert (len(first), len(server.requests)) == (1, 2)


def test_one_404_is_no_lost_job(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    server.fault = once(failure(404), "poll")
    assert service_of(server, tmp_path).render(["a cat"], [3]) == [clip(5)]
    assert len(server.requests) == 1


def test_a_job_that_never_ends_is_left_and_polled_once_more(server: VideoServer, tmp_path: Path) -> None:
    server.polls = 10**9
    for jobs in (1, 1, 2):
        [error] = service_of(server, tmp_path, time_limit_s=0.2).render(["a cat"], [3])
        assert "not completed in 0.2 s (render.time_limit_s)" in str(error)
        assert len(server.requests) == jobs


def test_a_wrong_key_or_model_stops_the_run(
    server: VideoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, what in ((401, "create"), (404, "create"), (401, "poll")):
        server.fault = once(failure(status, "no such thing"), what)
        with pytest.raises(EndpointError, match=r"render.endpoint refuses this: .*no such thing"):
            service_of(server, tmp_path).render(["a cat"], [3])
    with pytest.raises(EndpointError, match=r"render.endpoint.api_key_env: the variable NO_KEY is not set"):
        service_of(server, tmp_path, endpoint={"api_key_env": "NO_KEY"})
    server.close()
    with pytest.raises(EndpointError, match="cannot reach"):
        service_of(server, tmp_path).render(["a cat"], [3])


def test_the_key_is_sent_with_every_request(
    server: VideoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDEO_KEY", "secret-key")
    service_of(server, tmp_path, endpoint={"api_key_env": "VIDEO_KEY"}).render(["a cat"], [3])
    assert {headers["authorization"] for headers in server.seen_headers} == {"Bearer secret-key"}


def test_the_limit_of_cost_counts_what_is_under_way(server: VideoServer, tmp_path: Path) -> None:
    """A job is paid when it is completed; many may be under way until then."""
    account = Account(limit=1.0)
    gate = threading.Event()
    server.fault = lambda what, fields: (
        Reply({"status": "queued"}) if not gate.is_set() and what == "poll" else None
    )
    service = service_of(
        server, tmp_path, account, endpoint={"second_price": 0.1, "request": {"seconds": "3"}}
    )
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(service.render, [f"cat {i}"], [i]) for i in range(6)]
        while len(server.requests) < 4:
            gate.wait(0.01)
        gate.wait(0.1)
        assert not any(call.done() for call in calls), "who meets the limit waits for what will be paid"
        gate.set()
    errors = [call.exception() for call in calls]
    assert sum(error is None for error in errors) == len(server.requests) == 4
    assert sum(isinstance(error, CostLimitReached) for error in errors) == 2
    assert account.spent == pytest.approx(1.2)


def test_many_jobs_of_a_replica_are_under_way_at_once(server: VideoServer, tmp_path: Path) -> None:
    renderer = Renderer(settings_of(server, tmp_path), str(tmp_path), 7)
    server.fault = lambda what, fields: (
        Reply({"status": "queued"}) if len(server.jobs) < 8 and what == "poll" else None
    )
    rows = [candidate(f"cat {i}") for i in range(8)]
    with ThreadPoolExecutor(8) as threads:  # each waits until all have been created
        done = [row for [row] in threads.map(renderer, [[row] for row in rows])]
    assert all(row["video_key"] for row in done)
    assert renderer.rendered == 8


def test_rows_get_their_video_whoever_serves_the_model(
    server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    settings = settings_of(server, tmp_path, version="2")
    rows = [candidate("a cat"), candidate("a dog"), candidate("a cat")]
    renderer = Renderer(settings, str(tmp_path), 7)
    done = renderer(rows)
    table(done, FEEDBACK)
    assert done[0]["video_key"] == done[2]["video_key"] != done[1]["video_key"]
    assert (done[0]["frames"], done[0]["fps"], done[0]["width"], done[0]["height"]) == (9, 8.0, 96, 64)
    assert renderer.store.read(done[0]["video_key"]) == clip(5)
    assert kept(tmp_path) == [], "of what is stored, no job is kept"
    info = renderer.store.info(done[0]["video_key"])
    assert (info["model"], info["settings"], info["versions"]) == ("openai:wan@2", {"request": {}}, {})

    def key(**more: Any) -> str:
        [row] = Renderer(settings_of(server, tmp_path, **{"version": "2", **more}), str(tmp_path), 7)(
            rows[:1]
        )
        return str(row["video_key"])

    elsewhere = {"base_url": server.url.replace("127.0.0.1", "localhost"), "concurrency": 1, "form": False}
    assert key(endpoint=elsewhere, batch_size=2, time_limit_s=9) == done[0]["video_key"]
    assert len(server.requests) == 2
    others = {key(version=None), key(version="3"), key(model="x"), key(endpoint={"request": {"steps": 3}})}
    assert len(others | {done[0]["video_key"]}) == 5


def test_a_run_that_goes_on_polls_the_job_under_way(server: VideoServer, tmp_path: Path, clip: Clip) -> None:
    """The account is paid once: before the first process died, or after."""

    def dies(what: str, fields: Request) -> Reply | None:
        return failure(401, "the process died here") if what == at else None

    for at, paid_before in (("poll", 0.0), ("content", 1.0)):
        folder, server.fault, jobs = tmp_path / at, dies, len(server.requests) + 1
        first, second = Account(), Account()
        price = {"video_price": 1}
        with pytest.raises(EndpointError, match="died here"):
            service_of(server, folder, first, endpoint=price).render(["a cat"], [3])
        server.fault = lambda what, fields: None
        assert service_of(server, folder, second, endpoint=price).render(["a cat"], [3]) == [clip(5)]
        assert len(server.requests) == jobs
        assert (first.spent, second.spent) == (paid_before, 1.0 - paid_before)


def test_a_job_of_another_service_or_a_damaged_file_is_none(server: VideoServer, tmp_path: Path) -> None:
    server.polls = 10**9
    service_of(server, tmp_path, time_limit_s=0.1).render(["a cat"], [3])
    [file] = kept(tmp_path)
    server.polls = 1
    for text in (
        '{"id": "x", "base_url": "http://elsewhere/v1", "paid": false}',
        "[]",
        "{",
        '{"id": 1, "x": 2}',
    ):
        file.write_text(text, "utf-8")
        count = len(server.requests)
        service_of(server, tmp_path).render(["a cat"], [3])
        assert len(server.requests) == count + 1
    file.unlink()
    file.mkdir()
    with pytest.raises(StorageError):
        service_of(server, tmp_path).render(["a cat"], [3])


def test_an_answer_that_names_no_job_is_the_rows_error(server: VideoServer, tmp_path: Path) -> None:
    server.fault = lambda what, fields: Reply({"data": []})
    [error] = service_of(server, tmp_path).render(["a cat"], [3])
    assert str(error) == 'the service answered {"data": []}, which names no job'


def test_names_of_jobs_are_no_paths(server: VideoServer, tmp_path: Path) -> None:
    server.fault = lambda what, fields: Reply({"id": "../chat?a=b"}) if what == "create" else None
    service_of(server, tmp_path).render(["a cat"], [3])
    assert {path for path in server.paths if "chat" in path} == {"/v1/videos/..%2Fchat%3Fa=b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "steps has no effect with kind: openai: say it in endpoint.request"),
        ({"frames": 9, "width": 64}, "frames and width have no effect with kind: openai"),
        (
            {"kind": "diffusers", "endpoint": {"concurrency": 2}},
            "endpoint has no effect with kind: diffusers",
        ),
        ({"kind": "diffusers", "version": "2", "endpoint": {}}, "version has no effect with kind: diffusers"),
        ({"endpoint": {"logprobs": False}}, "endpoint.logprobs does nothing for a video service"),
        ({"endpoint": {"prompt_price": 1}}, "endpoint.prompt_price does nothing for a video service"),
        ({"endpoint": {"second_price": 1}}, "second_price needs the number request.seconds"),
        ({"endpoint": {"second_price": 1, "request": {"seconds": "x"}}}, "needs the number request.seconds"),
    ],
)
def test_keys_that_do_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Render.model_validate({"kind": "openai", "model": "wan", **change})


def test_a_stored_recipe_is_read_again() -> None:
    settings = Render(kind="openai", model="wan", endpoint={"video_price": 1})  # type: ignore[arg-type]
    assert Render.model_validate(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


# The image of a query


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (120, 60), turned: int = 1) -> bytes:
    """An image whose left half is white; `turned` is the orientation that its EXIF tells."""
    file, image, exif = BytesIO(), Image.new("RGB", size, colour), Image.Exif()
    image.paste("white", (0, 0, size[0] // 2, size[1]))
    exif[0x0112] = turned
    image.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp")])
def test_an_image_is_a_file_of_the_form(
    kind: str, ending: str, server: VideoServer, tmp_path: Path, clip: Clip
) -> None:
    data = picture("red", kind)
    service = service_of(server, tmp_path, endpoint={"request": {"fps": 8}})
    server.fault = once(failure(500))
    assert service.animate_files([(image_name(data), data)], ["a cat"], [3]) == [clip(5)]
    assert server.files == [{"input_reference": (f"image.{ending}", data, f"image/{ending}")}] * 2
    assert len({headers["idempotency-key"] for headers in server.seen_headers}) == 1
    assert [server.requests[-1][name] for name in ("model", "prompt", "seed", "fps")] == [
        "wan", "a cat", "3", "8",
    ]  # fmt: skip
    service.render(["a cat"], [3])
    assert server.files[-1] == {}
    assert "input_reference" not in server.requests[-1]


def test_an_image_has_the_size_that_the_request_asks_for(server: VideoServer, tmp_path: Path) -> None:
    """OpenAI refuses another one. What EXIF turns is turned."""
    service = service_of(server, tmp_path, endpoint={"request": {"size": "64x64"}})
    for turned, white in ((1, (0, 0)), (6, (0, 0)), (3, (63, 0))):
        data = picture("red", "JPEG", turned=turned)
        service.animate_files([(image_name(data), data)], ["a cat"], [turned])
        name, sent, kind = server.files[-1]["input_reference"]
        shown = decode_image(sent)
        assert (name, kind, shown.size) == ("image.png", "image/png", (64, 64))
        assert min(shown.getpixel(white)) > 200  # type: ignore[call-overload]
        other = shown.getpixel((63 - white[0], 63))
        assert other[0] > 200 > 100 > other[1]  # type: ignore[index]


def test_json_has_an_image_as_a_data_uri(server: VideoServer, tmp_path: Path) -> None:
    data = picture("red")
    file = image_name(data), data
    endpoint: dict[str, Any] = {"form": False}
    service_of(server, tmp_path, endpoint=endpoint).animate_files([file], ["a cat"], [3])
    assert server.requests[-1]["input_reference"] == {"image_url": data_uri(*file)}
    for form in (False, True):
        own = {"form": form, "request": {"input_reference": None}}
        service_of(server, tmp_path, endpoint=own).animate_files([file], ["a dog"], [3])
        assert "input_reference" not in server.requests[-1], "the recipe's own word counts"
    assert server.files[-1] == {}


def test_an_image_is_part_of_a_video_and_of_its_job(server: VideoServer, tmp_path: Path) -> None:
    images, account = ImageStore(tmp_path / "images"), Account()
    red, blue = (images.put(picture(colour)) for colour in ("red", "blue"))
    settings = settings_of(server, tmp_path / "videos", endpoint={"video_price": 0.5}, time_limit_s=0.2)
    rows = [{**candidate("a cat"), "image": name} for name in (red, blue, None, red)]

    def rendered() -> list[Row]:
        renderer = Renderer(settings, str(tmp_path / "videos"), 7, account, images=images.folder.uri)
        return renderer(rows)

    server.polls = 10**9
    assert all("was not completed in 0.2 s" in row["error"] for row in rendered())
    assert (len(server.requests), len(kept(tmp_path / "videos"))) == (3, 3)
    server.polls = 1
    done = rendered()
    table(done, FEEDBACK)
    assert len(server.requests) == 3, "jobs under way are polled"
    assert account.spent == 1.5
    assert len({row["video_key"] for row in done}) == 3
    assert done[0]["video_key"] == done[3]["video_key"]
    assert kept(tmp_path / "videos") == []
    shown = {files["input_reference"][1] for files in server.files if files}
    assert shown == {images.read(red), images.read(blue)}
    info = VideoStore(tmp_path / "videos").info(done[0]["video_key"])
    assert info["image"] == red.removesuffix(".png")


def test_an_image_that_a_service_refuses_is_the_rows_error(server: VideoServer, tmp_path: Path) -> None:
    data = picture("red")
    server.fault = once(failure(400, "Inpaint image must match the requested width and height"))
    [error] = service_of(server, tmp_path).animate_files([(image_name(data), data)], ["a cat"], [3])
    assert isinstance(error, RenderError)
    assert "created no job: render.endpoint: Error code: 400 - Inpaint image must match" in str(error)
    assert len(server.requests) == 1
