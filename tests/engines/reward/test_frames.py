import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import pytest
import torch

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.frames import choose_frames, every_frame, preprocess, read_frames
from vpo_ray.engines.video.engine import probe_video

CHAT = partial(choose_frames, strategy="chat")


def test_chat_takes_a_frame_a_second_and_base_24_of_the_first_minute() -> None:
    times = [i / 8 for i in range(49)]
    assert choose_frames(times, 8, "chat") == list(range(0, 49, 8))
    assert len(choose_frames([i / 8 for i in range(800)], 8, "chat")) == 24
    base = choose_frames([float(i) for i in range(100)], 1, "base")
    assert (base[0], base[-1], len(base)) == (0, 59, 24)
    assert choose_frames([0.0], 8, "base") == [0] * 24


def test_a_number_takes_so_many_frames_a_second() -> None:
    assert choose_frames([i / 8 for i in range(17)], 8, 4.0) == list(range(0, 17, 2))


def test_frames_are_those_chosen(clip: Callable[..., bytes]) -> None:
    video = clip(1, frames=17)
    every = read_frames(video, lambda times, _: list(range(len(times))))
    assert every.shape == (17, 64, 96, 3)
    assert (read_frames(video, CHAT) == every[[0, 8, 16]]).all()


def _moved(video: bytes, seconds: float, kind: str) -> bytes:
    """The same packets at other times, as a cut that encodes nothing anew leaves them."""
    moved = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(moved, "w", format=kind) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts += int(seconds / packet.time_base)
                packet.dts += int(seconds / packet.time_base)
                packet.stream = stream
                target.mux(packet)
    return moved.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "mpegts", "matroska"])
def test_a_video_may_begin_late(kind: str, clip: Callable[..., bytes]) -> None:
    video = clip(1, frames=33)
    assert (read_frames(_moved(video, 10.0, kind), CHAT) == read_frames(video, CHAT)).all()


def test_frames_from_before_a_cut_are_left_out(clip: Callable[..., bytes]) -> None:
    video = clip(1, frames=33)
    every = read_frames(video, every_frame)
    cut = _moved(video, -0.75, "mp4")
    assert (read_frames(cut, every_frame) == every[6:]).all()
    assert (read_frames(cut, CHAT) == every[[6, 14, 22, 30]]).all()
    assert probe_video(cut).frames == 27


@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "no frames", "sound only"])
def test_what_is_no_video_is_an_error_of_this_video(kind: str, clip: Callable[..., bytes]) -> None:
    whole = clip(1, frames=49)
    data = {
        "empty": b"",
        "text": b"<html>not found</html>" * 50,
        "cut off": whole[: len(whole) // 2],
        "no frames": whole[:40],
        "sound only": _sound(),
    }[kind]
    with pytest.raises(RewardError):
        read_frames(data, CHAT)


def test_bytes_damaged_anywhere_give_frames_or_an_error(clip: Callable[..., bytes]) -> None:
    whole = clip(2, frames=17)
    for place in range(0, len(whole), len(whole) // 60):
        damaged = whole[:place] + bytes(b ^ 0xFF for b in whole[place : place + 16]) + whole[place + 16 :]
        try:
            frames = read_frames(damaged, CHAT)
        except RewardError:
            continue
        assert frames.dtype == "uint8"
        assert frames.ndim == 4


def test_a_title_of_another_encoding_takes_no_video_away(clip: Callable[..., bytes]) -> None:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip(3))) as given, av.open(buffer, "w", format="mp4") as titled:
        titled.metadata["title"] = "TITLE"
        stream = titled.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                titled.mux(packet)
    latin = buffer.getvalue().replace(b"TITLE", "café!".encode("latin-1"))
    assert (read_frames(latin, CHAT) == read_frames(clip(3), CHAT)).all()
    assert probe_video(latin) == probe_video(clip(3))


@pytest.mark.parametrize(("height", "width"), [(480, 720), (720, 480), (57, 56), (56, 56), (10, 300)])
def test_pixels_are_a_centred_square(height: int, width: int) -> None:
    frames = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    reach = min(height, width) // 5
    middle = [slice(side // 2 - reach, side // 2 + reach) for side in (height, width)]
    frames[:, middle[0], middle[1]] = 255
    pixels = preprocess(frames, 56)
    assert tuple(pixels.shape) == (2, 3, 56, 56)
    assert pixels[0, 0, 27:29, 27:29].min() > pixels[0, 0, 0, 0]


def _sound() -> bytes:
    import io

    import av
    import numpy as np

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        samples.rate = 16000
        container.mux(track.encode(samples))
        container.mux(track.encode(None))
    return stream.getvalue()


def test_a_video_may_be_named(clip: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "a clip.mp4"
    path.write_bytes(clip(1, frames=17))
    expected = read_frames(path.read_bytes(), CHAT)
    assert (read_frames(str(path), CHAT) == expected).all()
    assert (read_frames(f"file://{path}", CHAT) == expected).all()
    for nowhere in (f"{tmp_path}/none.mp4", "nowhere://a/b.mp4"):
        with pytest.raises(RewardError, match="cannot read the video"):
            read_frames(nowhere, CHAT)
