import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from vpo_ray import recipe
from vpo_ray.engines.reward import Scored
from vpo_ray.engines.reward.checklist import load_checklist
from vpo_ray.records import FEEDBACK, Row, table
from vpo_ray.stages.score import ALARM_AFTER, Scorer
from vpo_ray.storage.videos import VideoStore

pytestmark = pytest.mark.engine


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore(tmp_path / "videos")


@pytest.fixture
def scorer(tiny_models: Path, store: VideoStore) -> Scorer:
    folder = tiny_models / "reward"
    checklist = recipe.Checklist(file=str(folder / "checklist.yaml"))
    settings = recipe.Reward(
        model=str(folder), dtype="float32", rule="margin", checklist=checklist, batch_size=2
    )
    return Scorer(settings, store.folder.uri)


def row(number: int, key: str | None, **more: object) -> Row:
    base = {"candidate_id": str(number), "query_id": "q", "query": "a cat", "k": number, "seed": 1}
    return {**base, "video_key": key, "seconds": {"render": 2.0}, **more}


def test_rows_are_scored_in_their_order_and_errors_stay_in_their_row(
    scorer: Scorer, store: VideoStore, clip: Callable[..., bytes]
) -> None:
    for i in range(3):
        store.write(f"video{i}", clip(i), {})
    store.write("broken", b"no video", {})
    store.write("damaged", clip(4), {})
    Path(store.uri("damaged")).write_bytes(b"other")
    before = row(5, "video0", error="timeout", error_stage="render")
    keys = ["video0", "absent", "broken", "damaged"]
    rows = [row(i, key) for i, key in enumerate(keys)] + [
        row(4, None),
        before,
        row(6, "video1"),
        row(7, "video2"),
    ]
    done = scorer(rows)
    assert [r["candidate_id"] for r in done] == [str(i) for i in range(8)]
    assert [r.get("error_stage") for r in done] == [
        None,
        "score",
        "score",
        "score",
        None,
        "render",
        None,
        None,
    ]
    assert "absent" in done[1]["error"]
    assert "not a readable video" in done[2]["error"]
    assert done[4] == rows[4]
    assert done[5] == before
    assert done[0]["reward"] == "visionreward"
    assert len(done[0]["answers"]) == 8
    assert done[0]["score"] == pytest.approx(sum(d["score"] for d in done[0]["dimensions"]))
    assert done[0]["seconds"]["render"] == 2.0
    assert done[0]["seconds"]["score"] > 0
    assert table(done, FEEDBACK).num_rows == 8
    assert not any(scorer.wants(r) for r in done if r.get("video_key"))
    assert scorer.reward.scored == 3


def test_one_score_for_all_videos_raises_an_alarm(
    scorer: Scorer, store: VideoStore, clip: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store.write("video0", clip(0), {})
    with caplog.at_level(logging.ERROR):
        scorer([row(i, "video0") for i in range(ALARM_AFTER)])
    assert scorer.reward.constant
    assert "got the score" in caplog.text


def test_every_reward_fills_columns_of_its_own(
    scorer: Scorer, store: VideoStore, clip: Callable[..., bytes]
) -> None:
    for i in range(2):
        store.write(f"video{i}", clip(i), {})
    store.write("broken", b"no video", {})
    script = scorer.settings.model_copy(update={"convention": "mean_pm1"})
    both = Scorer(scorer.settings, store.folder.uri, {"script": script})
    done = both([row(0, "video0"), row(1, "broken"), row(2, "video1")])
    assert [r.get("more_rewards") and len(r["more_rewards"]) for r in done] == [1, None, 1]
    for r in (done[0], done[2]):
        second = r["more_rewards"][0]
        assert second["name"] == "script"
        assert second["answers"] == r["answers"]
        weights = [question.weight for question in load_checklist(script.checklist).questions]
        # The documented relation between the two conventions.
        assert second["score"] == pytest.approx((2 * r["score"] - sum(weights)) / len(weights))
    assert table(done, FEEDBACK).to_pylist()[2]["more_rewards"] == done[2]["more_rewards"]


def test_a_video_that_one_reward_cannot_score_keeps_no_half_of_its_scores(
    scorer: Scorer, store: VideoStore, clip: Callable[..., bytes], tmp_path: Path
) -> None:
    store.write("video0", clip(0), {})
    question = "Is it " + "very " * 5000 + "sharp?"
    (tmp_path / "long.yaml").write_text(f"questions: [{{question: '{question}', weight: 1}}]", "utf-8")
    long = scorer.settings.model_copy(
        update={"checklist": recipe.Checklist(file=str(tmp_path / "long.yaml"))}
    )
    (done,) = Scorer(scorer.settings, store.folder.uri, {"longer": long})([row(0, "video0")])
    assert done["error"].startswith("longer: ")
    assert "2048" in done["error"]
    assert done["score"] is None
    assert done["more_rewards"] is None


class Odd:
    """A reward of others, some of whose scores are no numbers."""

    class Options(BaseModel):
        pass

    version = "1"

    def __init__(self, settings: recipe.Reward, options: BaseModel) -> None:
        self.scores: list[Any] = [1.0, math.nan, math.inf, None, "0.5", np.float32(0.5)]
        self.dimensions: list[Any] = [1.0, math.nan, math.inf, 1.0, 1.0, "much", None, 10**400]

    def score(self, videos: Sequence[bytes | str], queries: Sequence[str]) -> list[Scored | Exception]:
        scores = self.scores + [1.0] * (len(videos) - len(self.scores))
        given = zip(self.dimensions, scores, strict=True)
        return [Scored([], {"odd": dimension, "even": 2}, score) for dimension, score in given]


def test_a_score_that_is_no_number_is_an_error_of_its_row(
    store: VideoStore, clip: Callable[..., bytes]
) -> None:
    settings = recipe.Reward(kind=f"{__name__}:Odd", batch_size=8)
    for i in range(8):
        store.write(f"video{i}", clip(i), {})
    done = Scorer(settings, store.folder.uri)([row(i, f"video{i}") for i in range(8)])
    assert [r["score"] for r in done] == [1.0, None, None, None, None, None, 1.0, None]
    assert "its score is nan, no finite number" in done[1]["error"]
    assert done[2]["error_stage"] == "score"
    assert "its score is None" in done[3]["error"]
    assert "its dimension odd is 'much', no number" in done[5]["error"]
    # One that is not known is left out, as none of its numbers would be compared with another's.
    assert done[6]["dimensions"] == [{"name": "even", "score": 2.0}]
    table(done, FEEDBACK)
