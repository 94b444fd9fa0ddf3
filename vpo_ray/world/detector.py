"""Reads a clip's pixels: what it shows, by fixed rules. The world's ground truth; nothing is learnt here.

Every pixel is assigned to the nearest colour of a palette: sky and ground of one place, and the six colours
of things, either as drawn or washed out. The place and look whose palettes fit best are the clip's; the
pixels of things then give colour, shape, size, motion, and whether there is one whole thing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects, label

from vpo_ray.world.draw import EXTENT, GROUNDS, RADIUS, THINGS, wash

# Geometric means of what is drawn: between them an attribute cannot be told within these factors.
_ASPECT = (EXTENT["plank"][0] / EXTENT["plank"][1]) ** 0.5
_AREA = np.pi * RADIUS["small"] * RADIUS["large"]
_UNSURE = 1.1
STILL, MOVING = 4.0, 7.0  # pixels between the first and the last frame
_SPECK = 16  # pixels; smaller patches are no thing
_COLOURS = list(THINGS)


@dataclass(frozen=True)
class Detected:
    """What a clip shows. An attribute is None between two values, and "" where there is no thing."""

    colour: str | None
    shape: str | None
    size: str | None
    motion: str | None
    place: str
    look: str
    whole: bool


@dataclass(frozen=True)
class Segmented:
    """What the pixels of a clip belong to: `nearest` (frames, height, width) is the index of a thing's
    colour, below 0 for sky and ground; `things` the largest patch of each frame and whether it is nearly all
    there is, None without one."""

    place: str
    look: str
    nearest: np.ndarray
    things: list[tuple[np.ndarray, bool] | None]


def segment(clip: np.ndarray) -> Segmented:
    """What the pixels of a clip, uint8 RGB (frames, height, width, 3), belong to."""
    pixels = clip.reshape(-1, 3).astype(np.float32)
    fits = {}
    for place, look in itertools.product(GROUNDS, ("clear", "faded")):
        palette = np.array([*GROUNDS[place], *THINGS.values()], np.float32)
        palette = wash(palette) if look == "faded" else palette
        # Squared distances but for the pixel's own square.
        distance = (palette**2).sum(1)[:, None] - 2 * palette @ pixels.T
        square = distance.min(0) + (pixels**2).sum(1)
        fits[place, look] = (float(np.sqrt(square.clip(0)).mean()), distance)
    place, look = min(fits, key=lambda key: fits[key][0])
    nearest = fits[place, look][1].argmin(0).reshape(clip.shape[:-1]) - len(GROUNDS[place])
    return Segmented(place, look, nearest, [_largest(frame >= 0) for frame in nearest])


def detect(clip: np.ndarray) -> Detected:
    """What a clip, uint8 RGB (frames, height, width, 3), shows."""
    return describe(segment(clip))


def describe(parts: Segmented) -> Detected:
    """What a clip of these parts shows."""
    place, look, nearest, things = parts.place, parts.look, parts.nearest, parts.things
    present = [thing is not None for thing in things]
    if sum(present) < len(things) / 2:
        return Detected("", "", "", "", place, look, whole=False)
    masks = [mask for thing in things if thing is not None for mask in [thing[0]]]
    whole = sum(thing is not None and thing[1] for thing in things) >= len(things) - 1
    found = [frame[thing[0]] for frame, thing in zip(nearest, things, strict=True) if thing is not None]
    counts = np.bincount(np.concatenate(found), minlength=len(_COLOURS))
    return Detected(_colour(counts), _shape(masks), _size(masks), _motion(masks), place, look, whole)


def _largest(mask: np.ndarray) -> tuple[np.ndarray, bool] | None:
    """The largest patch, and whether it is nearly all there is; None without a patch."""
    patches, count = label(mask)
    if not count:
        return None
    areas = np.bincount(patches.ravel())[1:]
    largest = int(areas.argmax())
    if areas[largest] < _SPECK:
        return None
    others = areas[areas >= _SPECK].sum() - areas[largest]
    return patches == largest + 1, bool(others < 0.15 * areas[largest])


def _colour(counts: np.ndarray) -> str | None:
    first, second = np.sort(counts)[::-1][:2]
    # Half-covered pixels at the edge resemble other colours: up to a third of a small thing.
    return None if second > 0.6 * first else _COLOURS[int(counts.argmax())]


def _shape(masks: list[np.ndarray]) -> str | None:
    boxes = [find_objects(mask.astype(int))[0] for mask in masks]
    aspect = float(np.median([(b[1].stop - b[1].start) / (b[0].stop - b[0].start) for b in boxes]))
    if max(aspect, 1 / aspect) > _ASPECT * _UNSURE:
        return "plank" if aspect > 1 else "pole"
    return "ball" if max(aspect, 1 / aspect) < _ASPECT / _UNSURE else None


def _size(masks: list[np.ndarray]) -> str | None:
    area = float(np.median([mask.sum() for mask in masks]))
    if _AREA / _UNSURE < area < _AREA * _UNSURE:
        return None
    return "small" if area < _AREA else "large"


def _motion(masks: list[np.ndarray]) -> str | None:
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    dy, dx = centres[-2:].mean(0) - centres[:2].mean(0)
    way = max(abs(dx), abs(dy))
    if way < STILL:
        return "stays"
    if way < MOVING or min(abs(dx), abs(dy)) > 0.7 * way:
        return None
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
