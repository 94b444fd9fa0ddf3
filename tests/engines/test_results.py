"""What models of others give: what is no result is an error that says so, and costs its row alone."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from vpo_ray import recipe
from vpo_ray.engines.chat import Answer, ChatError, Metered, Sampling, Usage
from vpo_ray.engines.results import ResultsError, one_for_each
from vpo_ray.engines.reward import QuestionAnswer, RewardError, Scored
from vpo_ray.engines.reward.results import checked_scores
from vpo_ray.engines.video import RenderError, VideoModel
from vpo_ray.records import FEEDBACK, table
from vpo_ray.stages.render import Renderer
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore

GOOD = Scored([QuestionAnswer(1, True, 0.5)], {"motion": 1.0}, 1.0)


class NoOptions(BaseModel):
    pass


class Odd(VideoModel):
    """A reward and a video model of others: what they give is `given`."""

    Options = NoOptions
    version = "1"
    given: Any = None

    def __init__(self, settings: object, options: NoOptions) -> None:
        pass

    def score(self, videos: Sequence[Any], queries: Sequence[str]) -> Any:
        return self.given

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        return self.given


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {**dict.fromkeys(FEEDBACK.names), "candidate_id": str(i), "query_id": f"q{i}", "query": "a cat",
         "k": 0, "seed": 1, "prompt": "a cat", "verdict": "aligned", **more}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (0.5, "its result is float 0.5, no Scored"),
        (None, "its result is NoneType None, no Scored"),
        ({"score": 1}, "its result is dict {'score': 1}, no Scored"),
        (ValueError, "its result is type <class 'ValueError'>"),
        (Scored(None, {}, 1.0), "its answers are NoneType None, no list"),  # type: ignore[arg-type]
        (Scored([], None, 1.0), "its dimensions are NoneType None, no dict"),  # type: ignore[arg-type]
        (Scored([], {1: 1.0}, 1.0), "the name of a dimension is 1, no text"),  # type: ignore[dict-item]
        (Scored([], {"\ud800": 1.0}, 1.0), "the name of a dimension is '\\ud800', no text"),
        (Scored([{"question": 1}], {}, 1.0), "one of its answers is dict"),  # type: ignore[list-item]
        (Scored([QuestionAnswer("one", True, 0.5)], {}, 1.0), "one of its answers is"),  # type: ignore[arg-type]
        (Scored([QuestionAnswer(10**12, True, 0.5)], {}, 1.0), "a number, true or false, and a number"),
        (KeyError("frames"), "KeyError: 'frames'"),
        (RewardError(), "RewardError"),
    ],
)
def test_what_is_no_score_costs_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Any, says: str
) -> None:
    store = VideoStore(tmp_path)
    for i in range(2):
        store.write(f"video{i}", b"bytes", {})
    monkeypatch.setattr(Odd, "given", [result, GOOD])
    settings = recipe.Reward.model_validate({"kind": f"{__name__}:Odd", "batch_size": 2})
    given = [{**row, "video_key": f"video{i}"} for i, row in enumerate(rows(2))]
    bad, good = Scorer(settings, str(tmp_path))(given)
    assert says in bad["error"]
    assert (bad["error_stage"], bad["score"], good["error"], good["score"]) == ("score", None, None, 1.0)
    table([bad, good], FEEDBACK)


def test_numbers_of_other_libraries_are_pythons() -> None:
    answer = QuestionAnswer(np.int64(1), np.bool_(True), np.float32(0.5))  # type: ignore[arg-type]
    (found,) = checked_scores(
        (Scored([answer], {"motion": np.float16(1)}, np.float32(1)) for _ in "a"), 1, "it"
    )
    assert found == GOOD


@pytest.mark.parametrize(
    ("video", "says"),
    [
        (None, "no video: NoneType, no array of frames and no bytes"),
        ("/tmp/video.mp4", "no video: str, "),
        ([np.zeros((8, 8, 3), np.uint8)], "no video: list, "),
        (np.zeros((1, 2, 100_000, 3), np.uint8), "no video: x264 takes no frames of 100000 x 2"),
        (RenderError(), "RenderError"),
    ],
)
def test_what_is_no_video_costs_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Any, says: str
) -> None:
    monkeypatch.setattr(Odd, "given", [video, np.zeros((2, 8, 8, 3), np.uint8)])
    settings = recipe.Render.model_validate({"kind": f"{__name__}:Odd", "batch_size": 2, "frames": 2})
    bad, good = Renderer(settings, str(tmp_path), 7)(rows(2))
    assert says in bad["error"]
    assert (good["error"], good["frames"]) == (None, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "it gave NoneType, and not a list of 2 results"),
        ({"a": GOOD}, "it gave dict, and not a list"),
        ([GOOD], "it gave 1 results for 2"),
        ([GOOD] * 3, "it gave 3 results for 2"),
    ],
)
def test_a_list_of_another_length_says_whose_it_is(given: Any, says: str) -> None:
    with pytest.raises(ResultsError, match=says):
        one_for_each(given, 2, "it")


class Engine:
    def __init__(self, given: Any) -> None:
        self.given = given

    async def complete(self, *asked: Any) -> Any:
        return self.given


class Waits(Engine):
    def complete(self, *asked: Any) -> Any:  # type: ignore[override]
        return self.given


SAID = json.dumps({"prompt": "a cat"})


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        (Engine(SAID), "Engine.complete gave str, not an Answer"),
        (Engine(None), "Engine.complete gave NoneType, not an Answer"),
        (Engine(Answer(SAID.encode(), "stop", 1, 1)), "an Answer whose text is bytes"),  # type: ignore[arg-type]
        (Engine(Answer(SAID, "stop", float("nan"), 1)), "tokens or cost are no numbers"),  # type: ignore[arg-type]
        (Waits(Answer(SAID, "stop", 1, 1)), "Waits.complete is not asynchronous: define it with `async def`"),
    ],
)
def test_what_is_no_answer_is_an_error_of_its_chat(chat: Any, says: str) -> None:
    with pytest.raises(ChatError, match=says):
        asyncio.run(Metered(chat).complete([], Sampling(0.0, 1, 1)))


def test_an_engine_need_not_know_its_tokens() -> None:
    chat = Metered(Engine(Answer(SAID, "stop", None, None, None)))  # type: ignore[arg-type]
    assert asyncio.run(chat.complete([], Sampling(0.0, 1, 1))).text == SAID
    assert chat.usage == Usage()
