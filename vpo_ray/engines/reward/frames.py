"""Frames of a video (an mp4's bytes or address) for the reward model, and their pixels.

Frame choice, resize and crop follow VisionReward's `inference-video.py` and CogVLM2-Video's processor
exactly: a checkpoint's scores are valid only for the input it was trained on.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import av
import fsspec
import numpy as np

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.shared_decoding import Pick, shared_decoding

if TYPE_CHECKING:
    import torch

Strategy = Literal["chat", "base"] | float
MAX_FRAMES = 24
BASE_SECONDS = 60
# Seconds of a first frame that is not the nearest to second 0 alone.
LATE_S = 0.5
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def choose_frames(timestamps: Sequence[float], fps: float, strategy: Strategy) -> list[int]:
    """Indices of the chosen frames.

    Args:
        timestamps: seconds of every frame, in display order.
        fps: the clip's average frame rate.
        strategy: `base`: 24 uniform over the first 60 s (the same frame may occur twice); `chat`:
            the first frame nearest to each whole second, at most 24; a number: that many a second.
    """
    if strategy == "base":
        end = min(len(timestamps), int(BASE_SECONDS * fps))
        return [int(i) for i in np.linspace(0, end - 1, MAX_FRAMES, dtype=int)]
    rate = 1.0 if strategy == "chat" else float(strategy)
    times = np.asarray(timestamps, dtype=np.float64)
    # Python's round, half to even, as the reference: a clip that ends at 2.5 s has no third second.
    count = min(round(float(times.max()) * rate) + 1, MAX_FRAMES)
    return [int(np.abs(times - i / rate).argmin()) for i in range(count)]


def every_frame(timestamps: list[float], fps: float) -> list[int]:
    return list(range(len(timestamps)))


@dataclass
class _Decoded:
    """Frames of a video in RGB by their index; `failure` is what ended decoding before the last asked one."""

    timestamps: list[float]
    fps: float
    frames: dict[int, np.ndarray]
    failure: RewardError | None = None

    def chosen(self, pick: Pick) -> list[int]:
        return pick(self.timestamps, self.fps)

    def of(self, pick: Pick) -> np.ndarray:
        chosen = self.chosen(pick)
        found = sorted(set(chosen) & self.frames.keys())
        if len(found) < len(set(chosen)):
            raise self.failure or RewardError(
                f"the video is cut off: of the frames {chosen} only {found} can be decoded"
            )
        return np.stack([self.frames[index] for index in chosen])


def read_frames(video: bytes | str, pick: Pick) -> np.ndarray:
    """Decode frames of a video: uint8 RGB (T, H, W, 3).

    Args:
        video: an mp4 or another file that FFmpeg reads: its bytes, its path, or a URI of any scheme
            that fsspec opens.
        pick: the indices of the frames, in ascending order, from the timestamps and the frame rate.

    Raises:
        RewardError: no video, no frames, or a video that ends before its last chosen frame.
    """
    return _decoded(video, pick).of(pick)


def read_video(video: bytes | str) -> tuple[np.ndarray, float]:
    """All frames of a video, and how many there are a second; see `read_frames`."""
    decoded = _decoded(video, every_frame)
    return decoded.of(every_frame), decoded.fps


def _decoded(video: bytes | str, pick: Pick) -> _Decoded:
    """With the frames that `pick` chooses, and those that other rewards of this batch will ask for."""
    shared = shared_decoding()
    if shared is None:
        return _decode(video, [pick])
    kept: _Decoded | None = shared.find(video)
    if kept is None or not (kept.failure or kept.frames.keys() >= set(kept.chosen(pick))):
        kept = _decode(video, [pick, *shared.picks])
        shared.keep(video, kept)
    return kept


def _fetch(uri: str) -> bytes:
    try:
        with fsspec.open(uri, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, ImportError) as error:
        raise RewardError(f"cannot read the video {uri}: {error}") from error


def _times(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[float], float]:
    """Timestamps in display order and the average rate, from packet headers: nothing is decoded.

    A video that was cut without encoding it anew holds frames from before the cut, which players and decoders
    leave out, and an MPEG transport stream begins anywhere.
    """
    stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not stamps:
        raise RewardError("the video has no frames")
    rate = float(stream.average_rate or stream.base_rate or 0)
    if rate <= 0:
        raise RewardError("the video has no frame rate")
    if any(pts is None for pts in stamps):
        return [i / rate for i in range(len(stamps))], rate
    times = [float(pts * stream.time_base) for pts in sorted(stamps)]
    begin = times[0] if times[0] > LATE_S else 0.0
    return [time - begin for time in times], rate


def _decode(video: bytes | str, picks: Sequence[Pick]) -> _Decoded:
    """The frames of all of `picks`; decoding stops after the last of them. What the first raises is raised;
    what is wrong with frames that only the others ask for is theirs."""
    if isinstance(video, str):
        video = _fetch(video)
    try:
        with av.open(io.BytesIO(video), metadata_errors="replace") as container:
            if not container.streams.video:
                raise RewardError("the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            decoded = _Decoded(*_times(container, stream), {})
            wanted = set(decoded.chosen(picks[0]))
            for pick in picks[1:]:
                with suppress(RewardError):  # which is the other reward's own error
                    wanted |= set(decoded.chosen(pick))
            container.seek(0)
            _decode_wanted(container, stream, wanted, decoded)
    except av.error.FFmpegError as error:
        raise RewardError(f"not a readable video ({len(video)} bytes): {error.strerror}") from error
    return decoded


def _decode_wanted(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int], into: _Decoded
) -> None:
    last = max(wanted)
    try:
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                into.frames[index] = frame.to_ndarray(format="rgb24")
            if index == last:
                return
    except av.error.FFmpegError as error:
        into.failure = RewardError(
            f"not a readable video: of its frames only {sorted(into.frames)} can be decoded: {error.strerror}"
        )


def image_part(frame: np.ndarray) -> dict[str, Any]:
    """A frame as an image part of a chat message: high-quality JPEG, a tenth of the size of a PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels of the vision tower: uint8 (T, H, W, 3) to float32 (T, 3, size, size).

    CLIP normalisation, short side to `size` (bilinear, no antialias, long side floored), centre
    crop with the offset rounded half to even.
    """
    import torch

    mean = torch.tensor(CLIP_MEAN, device=frames.device).view(3, 1, 1, 1)
    std = torch.tensor(CLIP_STD, device=frames.device).view(3, 1, 1, 1)
    # Colour first, as the reference: the same kernels give the same bits.
    pixels = (frames.permute(3, 0, 1, 2).contiguous() / 255.0 - mean) / std
    height, width = pixels.shape[-2:]
    if width < height:
        shape = (math.floor(height / width * size), size)
    else:
        shape = (size, math.floor(width / height * size))
    pixels = torch.nn.functional.interpolate(pixels, size=shape, mode="bilinear", align_corners=False)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return pixels[:, :, top : top + size, left : left + size].transpose(0, 1).contiguous()
