"""Measures of videos: each has the value that its definition gives, and a video that has none is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError, Scored, build
from vpo_ray.engines.reward.frames import read_video
from vpo_ray.engines.reward.motion import Motion, temporal_flickering
from vpo_ray.engines.video.engine import encode
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore

NO_MODEL = ["temporal_flickering", "dynamic_degree", "motion_magnitude"]


def reward(**keys: Any) -> recipe.Reward:
    return recipe.Reward(**{"kind": "vbench", "dimensions": NO_MODEL, **keys})


def square(step: int, frames: int = 9, height: int = 96, width: int = 128) -> np.ndarray:
    """A light square with a pattern, which moves to the right by `step` pixels a frame."""
    pattern = np.random.default_rng(1).integers(100, 256, (6, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for i, frame in enumerate(video):
        frame[30:54, 10 + i * step : 34 + i * step] = pattern
    return video


def scored(result: Scored | Exception) -> Scored:
    assert isinstance(result, Scored), result
    return result


def test_flickering_is_one_for_equal_frames_and_zero_between_black_and_white() -> None:
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    assert temporal_flickering(np.concatenate([white] * 4)) == 1
    assert temporal_flickering(np.concatenate([black, white] * 3)) == 0
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    differences = [abs(noise[i + 1].astype(float) - noise[i].astype(float)).mean() for i in range(4)]
    assert temporal_flickering(noise) == pytest.approx((255 - sum(differences) / 4) / 255)


def test_motion_is_as_fast_as_what_moves() -> None:
    still, slow, fast = (Motion(square(step), fps=8) for step in (0, 2, 6))
    assert still.magnitude == 0
    # Pixels a frame, 8 frames a second, in sides of 96 pixels. The pattern covers 4.7 % of the frame.
    assert slow.magnitude == pytest.approx(2 * 8 / 96, rel=0.15)
    assert fast.magnitude == pytest.approx(6 * 8 / 96, rel=0.15)
    # The threshold is 6 pixels a frame of 256: here 2.25.
    assert [motion.dynamic for motion in (still, slow, fast)] == [0, 0, 1]


def test_motion_is_measured_over_an_eighth_of_a_second() -> None:
    every = Motion(square(2, frames=9), fps=8)
    third = Motion(square(2, frames=27, width=160), fps=24)
    assert len(every.lengths) == len(third.lengths) == 8
    assert third.magnitude == pytest.approx(3 * every.magnitude, rel=0.15)
    # At 4 frames a second a pixel has twice the time.
    assert Motion(square(4), fps=8).dynamic == 1
    assert Motion(square(4), fps=4).dynamic == 0


def test_large_frames_are_measured_as_small_ones() -> None:
    large = square(1).repeat(8, 1).repeat(8, 2)
    assert Motion(large, 8).magnitude == pytest.approx(Motion(square(1), 8).magnitude, rel=0.3)


def test_two_still_frames_do_not_move() -> None:
    assert Motion(square(0, frames=2), fps=8).dynamic == 0


def test_dimensions_are_in_the_order_of_the_recipe_and_the_score_is_their_mean() -> None:
    video = encode(square(6), 8, 12)
    one = scored(build(reward()).score([video], ["a square"])[0])
    assert list(one.dimensions) == NO_MODEL
    assert one.score == pytest.approx(sum(one.dimensions.values()) / 3)
    assert one.answers == []
    assert one.dimensions["dynamic_degree"] == 1
    frames, fps = read_video(video)
    assert fps == 8
    assert one.dimensions["temporal_flickering"] == temporal_flickering(frames)
    other = scored(build(reward(dimensions=NO_MODEL[::-1])).score([video], ["a square"])[0])
    assert list(other.dimensions) == NO_MODEL[::-1]
    assert other.dimensions == one.dimensions


def test_a_video_is_measured_alike_alone_and_beside_others(clip: Callable[..., bytes]) -> None:
    videos = [clip(i, frames=3 + i) for i in range(3)]
    model = build(reward())
    assert model.score(videos, ["q"] * 3) == [model.score([video], ["q"])[0] for video in videos]


def test_what_cannot_be_measured_is_an_error_of_its_video(clip: Callable[..., bytes]) -> None:
    good = clip(0)
    videos = [b"no video", good, good[: len(good) // 2], clip(1, frames=1), clip(2, height=8, width=8), good]
    results = build(reward()).score(videos, ["q"] * 6)
    assert [isinstance(result, RewardError) for result in results] == [True, False, True, True, True, False]
    assert results[1] == results[5]
    assert "one frame, and temporal_flickering and dynamic_degree and motion_magnitude" in str(results[3])
    assert "8 x 8 are too small" in str(results[4])


def test_sizes_are_free(clip: Callable[..., bytes]) -> None:
    odd = encode(np.random.default_rng(0).integers(0, 256, (3, 33, 41, 3), dtype=np.uint8), 8, 12)
    for result in build(reward()).score([odd, clip(0, height=200, width=24)], ["q", "q"]):
        assert 0 <= scored(result).dimensions["temporal_flickering"] <= 1


def test_rows_get_their_measures(tmp_path: Path) -> None:
    store = VideoStore(tmp_path / "videos")
    store.write("still", encode(square(0), 8, 12), {})
    store.write("moving", encode(square(6), 8, 12), {})
    store.write("broken", b"no video", {})
    motion = reward(dimensions=["motion_magnitude"])
    scorer = Scorer(
        reward(dimensions=["temporal_flickering"], batch_size=4), store.folder.uri, {"motion": motion}
    )
    rows: list[dict[str, Any]] = [
        {"candidate_id": key, "query_id": "q", "query": "a square", "k": 0, "seed": 1, "video_key": key}
        for key in ("still", "broken", "moving")
    ]
    still, broken, moving = scorer(rows)
    assert broken["error_stage"] == "score"
    assert still["reward"] == "vbench"
    assert still["dimensions"] == [{"name": "temporal_flickering", "score": still["score"]}]
    assert still["score"] > moving["score"]
    assert still["more_rewards"][0]["score"] < moving["more_rewards"][0]["score"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kind": "visionreward", "model": "m", "checklist": {"file": "c"}}, "dimensions has no effect"),
        ({"dino": "d"}, "dino has no effect with the dimensions"),
        ({"model": "m"}, "model has no effect with kind: vbench"),
        ({"dimensions": ["appearance_style"], "clip": "c"}, "styles"),
        ({"dimensions": []}, "dimensions"),
        ({"dimensions": ["dynamic_degree", "dynamic_degree"]}, "dynamic_degree is there twice"),
    ],
)
def test_a_recipe_says_what_its_dimensions_need_and_nothing_else(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        reward(**keys)
    assert says in str(caught.value)
