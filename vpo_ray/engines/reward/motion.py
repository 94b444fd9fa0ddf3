"""How much a video flickers and moves: the measures of `kind: vbench` that need no model.

`temporal_flickering` is VBench's. `dynamic_degree` has VBench's rule, but not its optical flow, RAFT: here it
is OpenCV's dense inverse search (DIS) on smaller frames. Its numbers cannot be compared with VBench's.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from vpo_ray.engines.reward import RewardError

# VBench's dynamic_degree.py: flow between frames of 8 a second; the mean of the fastest 5 % of pixels;
# 6 pixels in frames whose short side is 256; 4 of 16 frames.
_RATE = 8
_FASTEST = 0.05
_THRESHOLD = 6 / 256
_MOVING_SHARE = 4 / 16
_SHORT_SIDE = 256


def temporal_flickering(frames: np.ndarray) -> float:
    """1 where all frames (T, H, W, 3) are equal, 0 where each pixel goes from black to white and back: one
    less the mean absolute difference of neighbouring frames, over 255."""
    return 1 - float(np.mean([cv2.absdiff(a, b).mean() for a, b in pairwise(frames)])) / 255


class Motion:
    """The fastest motion between each two frames of a video, an eighth of a second apart (or the next, in a
    video with fewer frames a second).

    Args:
        frames: uint8 RGB (T, H, W, 3).
        fps: frames a second.

    Raises:
        RewardError: the video has no two such frames, or they are too small (under 8 x 12 pixels).
    """

    def __init__(self, frames: np.ndarray, fps: float) -> None:
        step = max(1, round(fps / _RATE))
        self.seconds = step / fps  # between two of them
        self.threshold = _THRESHOLD * max(1.0, _RATE / fps)
        grey = [_grey(frame) for frame in frames[::step]]
        if len(grey) < 2:
            raise RewardError(
                f"motion is measured over {self.seconds:.3g} s, the video has {len(frames)} frames"
            )
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        try:
            # In short sides of the frame.
            flows = (flow.calc(a, b, None) for a, b in pairwise(grey))  # type: ignore[call-overload]
            self.lengths = np.array([_fastest(found) for found in flows])
        except cv2.error as error:
            height, width = frames.shape[1:3]
            raise RewardError(f"frames of {width} x {height} are too small for optical flow") from error

    @property
    def magnitude(self) -> float:
        """Mean speed of the fastest 5 % of pixels, in short sides of the frame a second."""
        return float(self.lengths.mean() / self.seconds)

    @property
    def dynamic(self) -> float:
        """1 where a quarter of the frames move faster than VBench's threshold, otherwise 0."""
        fast = self.lengths > self.threshold
        # VBench's rule rounds to 0 for two frames, so that any two would move.
        return float(fast.sum() >= max(1, round((len(self.lengths) + 1) * _MOVING_SHARE)))


def _grey(frame: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = _SHORT_SIDE / min(grey.shape)
    return cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey


def _fastest(flow: np.ndarray) -> float:
    lengths = np.linalg.norm(flow, axis=-1).ravel()
    count = max(1, int(lengths.size * _FASTEST))
    return float(np.partition(lengths, -count)[-count:].mean()) / min(flow.shape[:2])
