"""A scorer's own server as the reward: the example as a process of its own, and servers that misbehave."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_server import EndpointServer, Reply, Request

from vpo_ray import recipe
from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.engines.endpoint.client import EndpointError
from vpo_ray.engines.reward import ImageReward, RewardError, RewardModel, Scored, build
from vpo_ray.engines.reward.http_scorer import read_scores
from vpo_ray.recipe import Reward
from vpo_ray.recipe.plugins import PluginError, find, plugin_problems
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore

EXAMPLE = Path(__file__).parents[3] / "examples/http-reward/server.py"
GOOD = {"dimensions": {"motion": 0.25, "look": 0.75}}
Start = Callable[..., EndpointServer]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.01)


class ScorerServer(EndpointServer):
    """Scores by `reply`; `identity` is what it says of itself, None for a server that does not."""

    def __init__(self, reply: Callable[[Request], Reply], identity: Any) -> None:
        self.identity = identity
        super().__init__(reply)

    def reply_to(self, method: str, path: str, request: Request) -> Reply:
        if method == "GET":
            return Reply({}, 404) if self.identity is None else Reply(self.identity)
        return self.reply(request)


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[EndpointServer] = []

    def make(
        reply: Callable[[Request], Reply] = lambda _: Reply(GOOD), identity: Any = None
    ) -> EndpointServer:
        servers.append(ScorerServer(reply, identity))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def settings(url: str, endpoint: dict[str, Any] | None = None, **options: Any) -> Reward:
    known = {"base_url": url, "timeout_s": 5, "retries": 1, **(endpoint or {})}
    return Reward.model_validate({"kind": "http", "endpoint": known, "options": options})


def scorer(server: EndpointServer, **options: Any) -> RewardModel:
    # The reference servers' clips need no decoding, so a few bytes do.
    return build(settings(server.url, **options))


def test_the_example_scores_as_a_process_of_its_own(clip: Any) -> None:
    from vpo_ray.engines.reward.frames import read_video

    environment = {"PATH": os.environ["PATH"]}  # without our package on its path
    command = [sys.executable, "-P", str(EXAMPLE), "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd="/") as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().split()[-1]
            reward = settings(f"http://127.0.0.1:{port}", dimensions=["brightness", "motion"])
            videos = [clip(1), b"no video", clip(2)]
            first, second, third = build(reward).score(videos, ["a cat", "a dog", "une fée 妖精"])
            identity = find(reward).identity(reward)
        finally:
            process.terminate()
    assert isinstance(second, RewardError)
    assert "this video has no score" in str(second)
    assert '"version": "1"' in identity
    for video, result in ((videos[0], first), (videos[2], third)):
        assert isinstance(result, Scored), result
        frames = read_video(video)[0] / 255.0
        luma = frames @ [0.299, 0.587, 0.114]
        assert result.dimensions["brightness"] == pytest.approx(luma.mean(), abs=0.01)
        assert result.dimensions["motion"] == pytest.approx(np.abs(np.diff(luma, axis=0)).mean(), abs=0.01)
        assert result.score == pytest.approx(sum(result.dimensions.values()) / 2)


def test_a_video_is_sent_with_its_query(start: Start) -> None:
    server = start()
    (result,) = scorer(server).score([b"bytes of a video"], ['a "cat"\n<|im_end|> 妖精 \U0001f600'])
    assert result == Scored([], GOOD["dimensions"], 0.5)
    [request] = server.requests
    assert request == {"query": 'a "cat"\n<|im_end|> 妖精 \U0001f600', "video": "bytes of a video"}
    assert server.paths[-1] == "/v1/score"
    assert "authorization" not in {k for k, v in server.seen_headers[0].items() if v != "Bearer none"}


def test_a_server_that_reads_the_store_itself_is_sent_uris(start: Start, tmp_path: Path, clip: Any) -> None:
    server, store = start(), VideoStore(tmp_path / "videos")
    store.write("video0", clip(0), {})
    row = {"candidate_id": "0", "query_id": "q", "query": "a cat", "prompt": "a cat sits", "k": 0, "seed": 1,
           "video_key": "video0"}  # fmt: skip
    (done,) = Scorer(settings(server.url, send="uri"), store.folder.uri)([row])
    assert done["score"] == 0.5
    assert server.requests == [{"query": "a cat", "video_uri": store.uri("video0")}]


def test_keys_come_from_variables_and_are_in_no_message(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_KEY", "s3cret-of-ours")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = start(lambda _: Reply({"error": "s3cret-of-ours is for cats only"}, 422))
    (result,) = scorer(server, headers={"X-Api-Key": "SCORER_KEY"}).score([b"v"], ["a dog"])
    assert server.seen_headers[0]["x-api-key"] == "s3cret-of-ours"
    assert "*** is for cats only" in str(result)
    monkeypatch.delenv("SCORER_KEY")
    with pytest.raises(PluginError, match=r"headers\.X-Api-Key: the variable SCORER_KEY is not set here"):
        scorer(server, headers={"X-Api-Key": "SCORER_KEY"})


BAD: list[tuple[Any, str]] = [
    ({"error": "the clip is too short"}, "the scorer says: the clip is too short"),
    ({"error": {"code": 3}}, 'the scorer says: {"code": 3}'),
    ([1, 2], "is no JSON object"),
    ('"text"', "is no JSON object"),
    (None, "is no JSON object"),
    ({}, "has no motion"),
    ({"dimensions": [1]}, "`dimensions` are no JSON object"),
    ({"dimensions": {"motion": "fast"}}, "the scorer's motion is no number: fast"),
    ({"dimensions": {"motion": True}}, "the scorer's motion is no number: true"),
    ({"dimensions": {"motion": float("nan")}}, "the scorer's motion is not finite: NaN"),
    ({"dimensions": {"motion": 1.0}, "score": float("inf")}, "the scorer's score is not finite"),
    ({"dimensions": {"look": 1.0}}, "has no motion"),
]


@pytest.mark.parametrize(("answer", "says"), BAD)
def test_an_answer_without_scores_is_its_videos_error(answer: Any, says: str, start: Start) -> None:
    server = start(lambda request: Reply(answer if request["query"] == "a dog" else GOOD))
    results = scorer(server, dimensions=["motion"]).score([b"1", b"2"], ["a cat", "a dog"])
    assert isinstance(results[0], Scored)
    assert isinstance(results[1], RewardError)
    assert says in str(results[1])


def test_scores_as_they_may_be_written() -> None:
    assert read_scores({"score": 3}) == Scored([], {}, 3.0)
    assert read_scores({"dimensions": {"a": 1, "b": 2.5}, "score": -7, "error": None}).score == -7.0
    assert read_scores({"dimensions": {"a\ud800": 1}}).dimensions == {"a?": 1.0}
    with pytest.raises(RewardError, match="has no dimensions and no score"):
        read_scores({})


def test_what_passes_is_asked_again_and_what_does_not_is_the_videos_error(start: Start) -> None:
    seen: list[str] = []

    def reply(request: Request) -> Reply:
        seen.append(request["query"])
        if request["query"] == "broken":
            return Reply({"error": "out of memory"}, 500)
        if request["query"] == "garbled":
            return Reply("<html>")
        return Reply({}, 503) if seen.count("slow") == 1 and request["query"] == "slow" else Reply(GOOD)

    slow, broken, garbled = scorer(start(reply)).score([b"1", b"2", b"3"], ["slow", "broken", "garbled"])
    assert isinstance(slow, Scored)
    assert "out of memory" in str(broken)
    assert "not readable" in str(garbled)
    assert [seen.count(name) for name in ("slow", "broken", "garbled")] == [2, 2, 2]


def test_a_server_that_is_down_or_has_no_such_route_stops_the_run(start: Start) -> None:
    with pytest.raises(PluginError, match=r"cannot reach http://127\.0\.0\.1:9") as down:
        build(settings("http://127.0.0.1:9", {"retries": 0}))
    assert down.value.stops_run
    model = scorer(start(lambda _: Reply({"detail": "Not Found"}, 404)))
    with pytest.raises(EndpointError, match="Not Found"):
        model.score([b"1"], ["a cat"])
    refused = scorer(start(lambda _: Reply({"error": "bad token"}, 401)))
    with pytest.raises(EndpointError, match="bad token"):
        refused.score([b"1"], ["a cat"])


def test_no_more_requests_at_once_than_the_recipe_says(start: Start) -> None:
    server = start()
    model = build(settings(server.url, {"concurrency": 3}))
    assert all(isinstance(r, Scored) for r in model.score([b"v"] * 12, ["a cat"] * 12))
    assert server.most_under_way <= 3


def test_a_scorer_is_known_by_its_name_and_version(start: Start) -> None:
    server = start(identity={"name": "motion", "version": 2})
    reward = settings(server.url, version="2")
    assert find(reward).identity(reward).endswith('+{"name": "motion", "version": "2"}')
    build(reward)
    with pytest.raises(PluginError, match=r"says version 2, the recipe's options\.version '3'"):
        build(settings(server.url, version="3"))
    silent = settings(start().url, name="motion", version="3")
    assert find(silent).identity(silent).endswith('+{"name": "motion", "version": "3"}')
    with pytest.raises(PluginError, match="/identity gives no JSON object"):
        build(settings(start(identity=[1]).url))


def test_a_plan_says_what_is_missing_and_what_does_nothing() -> None:
    none = Reward.model_validate({"kind": "http"})
    more = settings("http://h", {"logprobs": False})
    checked = Reward.model_validate({"kind": "http", "endpoint": {"base_url": "http://h"}, "template": "vqa"})
    found = plugin_problems({"a": none, "b": more, "c": checked})
    assert "endpoint.base_url is missing" in found["a"]
    assert "endpoint.logprobs does nothing for kind: http" in found["b"]
    assert "template has no effect with kind: http" in found["c"]
    assert recipe.Reward.model_validate(settings("http://h").model_dump()) == settings("http://h")


def test_the_image_of_a_query_is_sent_beside_its_video(start: Start) -> None:
    server = start()
    model = scorer(server)
    assert isinstance(model, ImageReward)
    results = model.score_with_images([b"one", b"two"], ["a", "b"], [("ab.webp", b"picture"), None])
    assert all(isinstance(result, Scored) for result in results)
    by_query = {request["query"]: request for request in server.requests}
    assert by_query["a"]["image"] == "picture"
    assert "image" not in by_query["b"]
