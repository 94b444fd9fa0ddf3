"""`/v1/optimize` with effort `videos`: the prompts of one query, evolved as a job, on the tiny video model.
The LLM that writes and judges is a server here."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure
from starlette.requests import Request as WebRequest
from tiny_endpoint import TINY

from vpo_ray.recipe import RecipeError, Serve, load, serve_of
from vpo_ray.serve import refinements
from vpo_ray.serve.app import ingress_app
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.ingress import Ingress
from vpo_ray.serve.keys import Key, make_key
from vpo_ray.serve.optimize_schema import parse_optimize
from vpo_ray.serve.refine_schema import Refinement, StoredRefinement, refinement_files
from vpo_ray.serve.refinements import SETTINGS_CHANGED, RefineDesk, RefinementJobs
from vpo_ray.serve.video_jobs import VideoRenderer, VideoScorer
from vpo_ray.stages import evolution

Start = Callable[[Callable[[Request], Reply]], EndpointServer]
LIGHT = ["in soft light", "at night in the rain", "under a red sky, slowly", "in deep snow, wide angle"]


def answer(request: Request) -> Reply:
    """Writes two prompts a round, by how many it was shown; the judge finds those in the rain unsafe."""
    text = request["messages"][0]["content"]
    (query,) = texts_of(text, "request")
    if "verdict" in json.dumps(request["response_format"]):
        verdict = "unsafe" if "rain" in texts_of(text, "prompt")[0] else "aligned"
        return completion({"critique": "so", "missing": [], "added": [], "verdict": verdict})
    tried = texts_of(text, "prompt")
    lights = [LIGHT[(len(tried) + more) % 4] for more in range(2)]
    return completion({"prompts": [f"{query}, take {len(tried)}, {light}." for light in lights]})


def texts_of(text: str, tag: str) -> list[str]:
    return [json.loads(found) for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text)]


def settings_for(folder: Path, models: Path, server: EndpointServer | None, *more: str) -> Serve:
    url = server.url if server is not None else "http://127.0.0.1:1/v1"
    endpoint = {"base_url": url, "api_key_env": None, "retries": 0, "timeout_s": 20, "prompt_price": 1.0}
    judge = {"model": "m", "backend": "openai", "endpoint": endpoint}
    reward = {"kind": "vbench", "dimensions": ["temporal_flickering", "dynamic_degree"]}
    flicker = {"kind": "vbench", "dimensions": ["temporal_flickering"]}
    values: dict[str, Any] = {
        "judge": judge,
        "reward": reward,
        "more_rewards": {"flicker": flicker},
        "pair.dominance": "none",
        "render.model": str(models / "video"),
        "policy.model": str(models / "policy"),
        "evolve": {"prompts": 2, "rounds": 4, "patience": None, "fitness": {"reward": 1, "flicker": 0.1}},
        "serve.videos": {"store": str(folder / "store"), "refine": {"budget": 4}},
    }
    return serve_of(load(TINY, [f"{key}={json.dumps(value)}" for key, value in values.items()] + list(more)))


class Replica:
    """Stands for a deployment's handle: the replica is in this process."""

    def __init__(self, replica: Any) -> None:
        self.remote = replica


def jobs_for(settings: Serve) -> RefinementJobs:
    """The owner of the jobs, with a real video model and real rewards. In a running loop."""
    videos = settings.videos
    assert videos is not None
    assert videos.refine is not None
    renderer = VideoRenderer(videos.render, videos.store)  # type: ignore[arg-type]
    scorer = VideoScorer(videos.reward, videos.store, videos.refine.more_rewards)  # type: ignore[arg-type]
    return RefinementJobs(None, None, Replica(renderer), Replica(scorer), settings, ())  # type: ignore[arg-type]


async def done(jobs: RefinementJobs, name: str) -> StoredRefinement:
    async with asyncio.timeout(120):
        while jobs.tasks:
            await asyncio.gather(*jobs.tasks)
    found = jobs.jobs.read(name)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process outlives its replicas."""
    for module in ("refinements", "video_jobs"):
        monkeypatch.setattr(f"vpo_ray.serve.{module}.bind_worker", lambda: None)


@pytest.mark.engine
def test_the_best_prompt_that_a_budget_finds_and_once(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start
) -> None:
    server = serve_endpoint(answer)
    settings = settings_for(tmp_path, tiny_models, server)

    async def ask() -> None:
        jobs = jobs_for(settings)
        first = Refinement.model_validate_json(await jobs.submit("a fox", [], 4, "mine") or "")
        assert (first.is_over, first.prompt, first.budget) == (False, None, 4)
        # Asked meanwhile by another: the same job.
        again = Refinement.model_validate_json(await jobs.submit("a fox \r\n", [], 4, "other") or "")
        assert again.id == first.id
        assert len(jobs.tasks) == 1
        found = await done(jobs, first.id)
        assert (found.status, found.ended, found.videos) == ("completed", evolution.BUDGET, 4), found
        scored = [one for one in found.trace if one.fitness is not None]
        assert len(scored) == 4
        best = max(scored, key=lambda one: one.fitness or 0)
        assert found.prompt == best.prompt
        assert found.changed == (best.round > 0)
        assert (found.fault is None) == found.changed
        assert {*scored[0].dimensions} >= {"reward", "reward.dynamic_degree", "flicker"}  # type: ignore[misc]
        unsafe = [one for one in found.trace if one.verdict == "unsafe"]
        assert unsafe
        assert all(one.prompt is None and one.fitness is None for one in unsafe)
        assert found.cost == pytest.approx(len(server.requests) * 1000 / 1e6)
        assert found.owners == ["mine", "other"]
        assert "rain" not in found.shown().model_dump_json()
        # Later it is read: nobody is asked again.
        asked = len(server.requests)
        late = Refinement.model_validate_json(await jobs_for(settings).submit("a fox", [], 4, "late") or "")
        assert (late.status, late.prompt, len(server.requests)) == ("completed", found.prompt, asked)
        fewer = Refinement.model_validate_json(await jobs.submit("a fox", [], 3, "mine") or "")
        assert fewer.id != first.id
        assert (await done(jobs, fewer.id)).videos == 3

    asyncio.run(ask())


@pytest.mark.engine
def test_a_job_goes_on_where_a_replica_left_it(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start
) -> None:
    server = serve_endpoint(answer)
    whole = settings_for(tmp_path / "whole", tiny_models, server)
    killed = settings_for(tmp_path / "killed", tiny_models, server)

    async def undisturbed() -> StoredRefinement:
        jobs = jobs_for(whole)
        made = json.loads(await jobs.submit("a fox", [], 4, "mine") or "")
        return await done(jobs, made["id"])

    async def stopped(after: int) -> str:
        jobs, asked = jobs_for(killed), len(server.requests)
        if not jobs.tasks:
            await jobs.submit("a fox", [], 4, "mine")
        async with asyncio.timeout(120):
            while jobs.tasks and len(server.requests) < asked + after:
                await asyncio.sleep(0.01)
        (name,) = jobs.live or [""]
        return name  # the loop ends, and its tasks with it

    async def goes_on(name: str) -> StoredRefinement:
        jobs = jobs_for(killed)
        assert jobs.tasks, "it was left"
        return await done(jobs, name)

    expected = asyncio.run(undisturbed())
    name = asyncio.run(stopped(1))
    assert refinement_files(str(tmp_path / "killed/store")).unfinished()[0].id == name == expected.id
    assert asyncio.run(stopped(2)) == name
    found = asyncio.run(goes_on(name))
    assert [one.model_dump() for one in found.trace] == [one.model_dump() for one in expected.trace]
    assert (found.prompt, found.videos) == (expected.prompt, expected.videos)


@pytest.mark.engine
def test_what_failed_is_tried_again_and_what_was_made_stays(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start
) -> None:
    def down(request: Request) -> Reply:
        return failure(500) if "verdict" not in json.dumps(request["response_format"]) else answer(request)

    server = serve_endpoint(down)
    settings = settings_for(tmp_path, tiny_models, server)

    async def ask() -> None:
        jobs = jobs_for(settings)
        name = json.loads(await jobs.submit("a fox", [], 3, "mine") or "")["id"]
        found = await done(jobs, name)
        assert (found.status, found.videos, found.ended) == ("failed", 1, evolution.UNANSWERED)
        assert found.error is not None
        assert (found.error["code"], found.prompt) == ("no_prompt", None)
        server.reply = answer
        assert json.loads(await jobs.submit("a fox", [], 3, "mine") or "")["id"] == name
        found = await done(jobs, name)
        assert (found.status, found.error, found.videos) == ("completed", None, 3)

    asyncio.run(ask())


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("fallback", [False, True])
def test_where_no_prompt_passes_it_is_an_error_or_the_query_as_the_endpoint_falls_back(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start, fallback: bool
) -> None:
    least = "evolve.thresholds={reward: 99}"
    settings = settings_for(
        tmp_path, tiny_models, serve_endpoint(answer), least, f"serve.fallback={fallback}", "evolve.rounds=1"
    )

    async def ask() -> StoredRefinement:
        jobs = jobs_for(settings)
        return await done(jobs, json.loads(await jobs.submit("a fox", [], 3, "mine") or "")["id"])

    found = asyncio.run(ask())
    assert found.fault == evolution.NONE_PASSES
    assert {one.refused for one in found.trace if one.fitness is not None} == {"reward below 99"}
    if fallback:
        assert (found.status, found.prompt, found.changed) == ("completed", "a fox", False)
    else:
        assert found.error is not None
        assert (found.prompt, found.error["code"]) == (None, "no_prompt")


@pytest.mark.engine
def test_the_safety_gate_looks_at_the_query_and_before_a_prompt_is_rendered(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start
) -> None:
    (tmp_path / "words").write_text("sky\nknife\n", "utf-8")
    gate = f"serve.safety={{query: refuse, prompt: true, keywords: {tmp_path / 'words'}}}"
    settings = settings_for(tmp_path, tiny_models, serve_endpoint(answer), gate, "evolve.rounds=1")

    async def ask(query: str) -> StoredRefinement:
        jobs = jobs_for(settings)
        return await done(jobs, json.loads(await jobs.submit(query, [], 4, "mine") or "")["id"])

    refused = asyncio.run(ask("a knife"))
    assert refused.error is not None
    assert (refused.error["code"], refused.videos, refused.trace) == ("content_filter", 0, [])
    found = asyncio.run(ask("a fox"))
    assert (found.videos, {one.verdict for one in found.trace[1:]}) == (1, {"unsafe"})
    assert not any(one.prompt for one in found.trace[1:])
    stored = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "store").rglob("*.json")]
    assert [one["prompt"] for one in stored if "fps" in one] == ["a fox"]


def test_a_job_of_other_settings_ends_with_the_reason(tmp_path: Path, tiny_models: Path) -> None:
    settings = settings_for(tmp_path, tiny_models, None)
    files = refinement_files(str(tmp_path / "store"))
    files.write(StoredRefinement(id="refineold", model="vpo", query="a", budget=4, created_at=1))

    async def go() -> StoredRefinement:
        return await done(jobs_for(settings), "refineold")

    found = asyncio.run(go())
    assert found.error is not None
    assert (found.status, found.error["message"]) == ("failed", SETTINGS_CHANGED)


# Requests


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"effort": "videos", "budget": 9}, "budget is 9, at most 4 is allowed"),
        ({"effort": "videos", "budget": 1}, "budget"),
        ({"effort": "videos", "n": 2, "seed": 1}, "n, seed: no effect with effort: videos"),
        ({"effort": "videos", "stream": True}, "stream: no effect"),
        ({"effort": "videos", "keep": ["red"]}, "keep: no effect"),
        ({"budget": 4}, "budget has no effect without effort: videos"),
        ({"effort": "high", "budget": 4}, "ranks no candidates"),
    ],
)
def test_what_has_no_effect_is_refused(
    tmp_path: Path, tiny_models: Path, body: dict[str, Any], says: str
) -> None:
    settings = settings_for(tmp_path, tiny_models, None)
    with pytest.raises(ApiError, match=says) as told:
        parse_optimize(json.dumps({"query": "q", **body}).encode(), settings)
    assert told.value.status == 422
    asked = parse_optimize(b'{"query": "q --ar 16:9", "effort": "videos"}', settings)
    assert (asked.budget, asked.queries) == (4, ["q"])
    with pytest.raises(ApiError, match=r"serve\.videos\.refine"):
        parse_optimize(b'{"query": "q", "effort": "videos"}', Serve())
    with pytest.raises(ApiError, match="queries: no effect"):
        parse_optimize(b'{"queries": ["q"], "effort": "videos"}', settings)


def test_a_key_pays_by_videos_and_a_known_query_costs_one(tmp_path: Path, tiny_models: Path) -> None:
    settings = settings_for(tmp_path, tiny_models, None)
    taken: list[int] = []

    class Owner:
        """Takes every job; there are no places when it is full."""

        full = False

        @property
        def submit(self) -> Any:
            return self

        async def remote(self, *given: Any) -> str | None:
            return None if self.full else json.dumps(given[:1])

    owner = Owner()
    desk = RefineDesk(settings, owner)  # type: ignore[arg-type]
    asked = parse_optimize(b'{"query": "a fox", "effort": "videos", "budget": 3}', settings)

    def ask(key: Key) -> Any:
        return asyncio.run(desk.ask(asked, key, taken.append))

    assert ask(Key("mine", "")).status_code == 202
    job = StoredRefinement(
        id=desk.names.name("a fox", [], 3),
        model="vpo",
        query="a fox",
        budget=3,
        created_at=1,
        owners=["mine"],
    )
    for status in ("in_progress", "completed", "failed"):
        desk.jobs.write(job.model_copy(update={"status": status}))
        ask(Key("mine", ""))
        found = asyncio.run(desk.find(job.id, Key("mine", "")))
        assert (found.status, hasattr(found, "owners")) == (status, False)
        with pytest.raises(ApiError, match="there is no search"):
            asyncio.run(desk.find(job.id, Key("other", "")))
        desk.jobs.folder.delete(f"{job.id}.json")
    assert taken == [3, 1, 1, 3]
    with pytest.raises(ApiError, match="its scopes lack videos") as told:
        ask(Key("narrow", "", scopes=("optimize",)))
    assert told.value.status == 403
    owner.full = True
    with pytest.raises(ApiError, match="too many requests"):
        ask(Key("mine", ""))


def test_equal_queries_are_one_job_and_what_decides_its_result_another(
    tmp_path: Path, tiny_models: Path
) -> None:
    def name(query: str = "a fox", budget: int = 4, *more: str) -> str:
        settings = settings_for(tmp_path, tiny_models, None, *more)
        asked = parse_optimize(json.dumps({"query": query, "effort": "videos"}).encode(), settings)
        names = refinements.Refinements(settings)
        return names.name(asked.queries[0], asked.flags[0], budget)

    assert name() == name("  a fox\r\n") == name("a fox", 4, "serve.max_n=3", "serve.videos.score=true")
    assert name() == name("a fox", 4, "judge.refine_prompt=mine.txt")
    others = [
        name("a dog"), name("a fox", 3), name("a fox --ar 16:9"), name("a fox", 4, "evolve.top=2"),
        name("a fox", 4, "render.steps=1"), name("a fox", 4, "evolve.fitness={flicker: 1}"),
        name("a fox", 4, "more_rewards={}", "evolve.fitness={}"), name("a fox", 4, "judge.model=n"),
    ]  # fmt: skip
    assert len({name(), *others}) == 1 + len(others)


def test_an_endpoint_that_cannot_have_it_says_why(tmp_path: Path, tiny_models: Path) -> None:
    refine = f"serve.videos={{store: {tmp_path}, refine: {{}}}}"
    with pytest.raises(RecipeError, match=r"judge has backend: vllm; .*serve\.videos\.refine\.judge with"):
        ingress_app(None, None, serve_of(load(TINY, [refine])), ())
    plain = Serve.model_validate({"videos": {"store": str(tmp_path), "refine": {}}})
    with pytest.raises(RecipeError, match=r"serve\.videos\.render is missing"):
        ingress_app(None, None, plain, ())
    off = serve_of(load(TINY, [f"serve.videos={{store: {tmp_path}}}"]))
    assert off.videos is not None
    assert off.videos.refine is None


# Through the endpoint


# Serve wraps the class in one that wants a replica around it.
PLAIN = next(base for base in Ingress.__mro__ if "_admitted" in base.__dict__)


class Alone(PLAIN):
    """The class without Serve around it, which would await its end."""

    def __del__(self) -> None:
        """Nothing is kept here."""


class Handle:
    """Stands for the handle of the owner of the jobs, which is in this process."""

    def __init__(self, jobs: RefinementJobs) -> None:
        self.submit = Replica(jobs.submit)


@pytest.mark.engine
def test_the_routes_take_a_query_and_give_its_job_to_who_asked(
    tmp_path: Path, tiny_models: Path, serve_endpoint: Start
) -> None:
    (mine, line), (other, other_line) = make_key("mine"), make_key("other")
    (tmp_path / "keys").write_text(f"{line} requests_per_minute=6\n{other_line}\n", "utf-8")
    keys = f"serve.keys={tmp_path / 'keys'}"
    settings = settings_for(tmp_path, tiny_models, serve_endpoint(answer), keys)

    async def ask() -> None:
        jobs = jobs_for(settings)
        ingress = Alone(None, None, None, settings, (), Handle(jobs))

        async def call(route: str, key: str, body: Any = None, *rest: str) -> tuple[int, Any]:
            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

            headers = [(b"authorization", f"Bearer {key}".encode())]
            scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
            reply = await getattr(ingress, route)(WebRequest(scope, receive), *rest)
            return reply.status_code, json.loads(reply.body)

        body = {"query": "a fox", "effort": "videos"}
        status, made = await call("optimize", mine, body)
        assert (status, made["object"], made["prompt"], made["budget"]) == (202, "refinement", None, 4)
        # Four of its six are taken; an equal query costs one, another four.
        assert (await call("optimize", mine, body))[1]["id"] == made["id"]
        status, told = await call("optimize", mine, {**body, "query": "a dog"})
        assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")
        status, told = await call("refinement", other, None, made["id"])
        assert (status, told["error"]["code"]) == (404, "refinement_not_found")
        await done(jobs, made["id"])
        status, found = await call("refinement", mine, None, made["id"])
        assert (status, found["status"], found["videos"]) == (200, "completed", 4)
        assert not {"owners", "asks", "results"} & found.keys()
        status, late = await call("optimize", other, body)
        assert (status, late["prompt"]) == (202, found["prompt"])
        assert (await call("refinement", other, None, made["id"]))[0] == 200

    asyncio.run(ask())


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_a_query_is_asked_for_and_polled(
    endpoint: Callable[..., str], tiny_models: Path, serve_endpoint: Start, tmp_path: Path
) -> None:
    server = serve_endpoint(answer)
    settings = settings_for(tmp_path, tiny_models, server)
    (mine, line), (other, other_line) = make_key("mine"), make_key("other")
    (tmp_path / "keys").write_text(f"{line} requests_per_minute=6\n{other_line}\n", "utf-8")
    assert settings.videos is not None
    where = endpoint("search", keys=str(tmp_path / "keys"), videos=settings.videos.model_dump())
    headers = {"Authorization": f"Bearer {mine}"}
    body = {"query": "a fox", "effort": "videos"}
    began = time.monotonic()
    reply = httpx.post(f"{where}/optimize", json=body, headers=headers, timeout=60)
    assert reply.status_code == 202, reply.text
    made = reply.json()
    assert (made["object"], made["prompt"], made["budget"]) == ("refinement", None, 4)
    assert time.monotonic() - began < 20
    # Four of its six are taken; an equal query costs one, another four.
    again = httpx.post(f"{where}/optimize", json=body, headers=headers, timeout=60)
    assert (again.status_code, again.json()["id"]) == (202, made["id"])
    refused = httpx.post(f"{where}/optimize", json={**body, "query": "a dog"}, headers=headers, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    strange = {"Authorization": f"Bearer {other}"}
    assert httpx.get(f"{where}/optimize/{made['id']}", headers=strange, timeout=60).status_code == 404
    end = time.monotonic() + 180
    found = made
    while found["status"] not in ("completed", "failed"):
        assert time.monotonic() < end, found
        time.sleep(0.3)
        found = httpx.get(f"{where}/optimize/{made['id']}", headers=headers, timeout=60).json()
    assert (found["status"], found["videos"]) == ("completed", 4), found
    assert found["prompt"] in [one["prompt"] for one in found["trace"] if one["fitness"] is not None]
    # Its video is in the store: the one of this query and prompt.
    stored = len(list((tmp_path / "store").rglob("*.mp4")))
    given = {"query": "a fox", "prompt": found["prompt"]}
    video = httpx.post(f"{where}/videos", json=given, headers=strange, timeout=60).json()
    while video["status"] not in ("completed", "failed"):
        assert time.monotonic() < end, video
        time.sleep(0.3)
        video = httpx.get(f"{where}/videos/{video['id']}", headers=strange, timeout=60).json()
    assert video["status"] == "completed", video
    assert len(list((tmp_path / "store").rglob("*.mp4"))) == stored
