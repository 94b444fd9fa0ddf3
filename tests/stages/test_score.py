import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_ray import recipe
from vpo_ray.records import FEEDBACK, Row, table
from vpo_ray.stages.score import ALARM_AFTER, Scorer
from vpo_ray.videos import VideoStore

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
    assert scorer.scored == 3


def test_one_score_for_all_videos_raises_an_alarm(
    scorer: Scorer, store: VideoStore, clip: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store.write("video0", clip(0), {})
    with caplog.at_level(logging.ERROR):
        scorer([row(i, "video0") for i in range(ALARM_AFTER)])
    assert scorer.constant
    assert "got the score" in caplog.text
