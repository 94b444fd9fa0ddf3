"""A video that several rewards read is decoded once, and each gets the frames that it would get alone."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from vpo_ray import recipe
from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.frames import choose_frames, every_frame, read_frames, read_video
from vpo_ray.engines.reward.pav_frames import four_frames
from vpo_ray.engines.reward.shared_decoding import decoding_once
from vpo_ray.engines.reward.videoscore_model import choose_spread
from vpo_ray.stages.score import Scorer
from vpo_ray.storage.videos import VideoStore
from vpo_ray.world.tiny_scorers import (
    make_tiny_clip,
    make_tiny_heads,
    make_tiny_mps,
    make_tiny_videoscore,
)

CHAT = partial(choose_frames, strategy="chat")
SIXTEEN = partial(choose_spread, most=16)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the files that were decoded."""
    seen: list[int] = []
    real = av.open

    def watched(file: io.BytesIO, *args: object, **more: object) -> object:
        seen.append(len(file.getvalue()))
        return real(file, *args, **more)

    monkeypatch.setattr(av, "open", watched)
    return seen


def test_a_video_is_decoded_once_for_all(clip: Callable[..., bytes], opened: list[int]) -> None:
    videos = [clip(1, 49), clip(2, 9)]
    alone = [[read_frames(video, pick) for pick in (CHAT, four_frames, SIXTEEN)] for video in videos]
    opened.clear()
    with decoding_once([CHAT, four_frames, SIXTEEN]):
        together = [[read_frames(video, pick) for video in videos] for pick in (CHAT, four_frames, SIXTEEN)]
    assert len(opened) == 2
    for number, found in enumerate(together):
        assert all(np.array_equal(one, alone[i][number]) for i, one in enumerate(found))
    with decoding_once([every_frame]):
        again = read_frames(videos[0], CHAT)
        frames, rate = read_video(videos[0])
    assert (len(frames), rate, len(opened)) == (49, 8.0, 3)
    assert np.array_equal(again, alone[0][0])
    read_frames(videos[0], CHAT)
    assert len(opened) == 4, "nothing is kept when the batch is done"


def test_frames_that_nobody_announced_are_read_too(clip: Callable[..., bytes], opened: list[int]) -> None:
    video = clip(1, 49)
    right = read_frames(video, lambda times, fps: [5, 48])
    opened.clear()
    with decoding_once([CHAT]):
        read_frames(video, CHAT)
        found = read_frames(video, lambda times, fps: [5, 48])
        read_frames(video, CHAT)
    assert len(opened) == 2
    assert np.array_equal(found, right)


def test_what_is_wrong_for_one_is_not_for_the_others(clip: Callable[..., bytes]) -> None:
    def none(times: list[float], fps: float) -> list[int]:
        raise RewardError("too short")

    def beyond(times: list[float], fps: float) -> list[int]:
        return [0, 100]

    video = clip(1, 9)
    with decoding_once([four_frames, none, beyond]):
        assert len(read_frames(video, four_frames)) == 4
        with pytest.raises(RewardError, match="too short"):
            read_frames(video, none)
        with pytest.raises(RewardError, match=r"of the frames \[0, 100\] only \[0\] can be decoded"):
            read_frames(video, beyond)
        with pytest.raises(RewardError, match="not a readable video"):
            read_frames(b"no video", four_frames)


def test_the_seven_columns_of_prompt_a_video(
    clip: Callable[..., bytes], opened: list[int], tmp_path: Path
) -> None:
    make_tiny_clip(tmp_path / "clip", "quick_gelu")
    make_tiny_heads(tmp_path)
    make_tiny_mps(tmp_path / "mps")
    make_tiny_videoscore(tmp_path / "videoscore")
    options = {"clip": f"{tmp_path}/clip", "head": f"{tmp_path}/v1.safetensors"}
    aesthetic = recipe.Reward(kind="laion_aesthetic", options=options, batch_size=2)
    more = {
        "mps": recipe.Reward(kind="mps", model=f"{tmp_path}/mps"),
        "videoscore": recipe.Reward(
            kind="videoscore",
            model=f"{tmp_path}/videoscore",
            options={"query_prompt": f"{tmp_path}/videoscore/query_prompt.txt"},
        ),
    }
    store = VideoStore(tmp_path / "videos")
    for i in range(3):
        store.write(f"video{i}", clip(i, 17), {})
    rows = [{"query": "a cat", "video_key": f"video{i}", "seconds": {}} for i in range(3)]
    opened.clear()
    together = Scorer(aesthetic, store.folder.uri, more)(rows)
    assert len(opened) == 3
    columns = [d["name"] for part in (together[0], *together[0]["more_rewards"]) for d in part["dimensions"]]
    assert columns == [
        "aesthetic", "mps", "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment",
        "factual_consistency",
    ]  # fmt: skip
    assert together[0]["reward"].startswith(
        "vpo_ray.engines.reward.laion_aesthetic:LaionAesthetic@1+v1, head "
    )
    for name, reward in more.items():
        for row, one in zip(together, Scorer(reward, store.folder.uri)(rows), strict=True):
            (found,) = [part for part in row["more_rewards"] if part["name"] == name]
            assert found["dimensions"] == one["dimensions"]
