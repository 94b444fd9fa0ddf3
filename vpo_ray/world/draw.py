"""Draws a scene: the clips that the world's models are trained on."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from vpo_ray.world.scene import Scene

FRAMES, SIDE, FPS = 9, 64, 8

# RGB of things, and of sky and ground. Things are saturated (or white) and grounds are not, so that a
# pixel tells which of them it belongs to.
THINGS = {
    "red": (225, 45, 45),
    "yellow": (250, 225, 40),
    "green": (40, 210, 80),
    "blue": (50, 80, 240),
    "violet": (175, 60, 225),
    "white": (250, 250, 250),
}
GROUNDS = {
    "meadow": ((150, 185, 205), (95, 130, 75)),
    "sea": ((170, 175, 170), (60, 105, 125)),
    "night": ((20, 22, 45), (45, 42, 62)),
    "desert": ((205, 190, 165), (180, 145, 100)),
}
RADIUS = {"small": 7.0, "large": 12.0}
# Half width and half height in radii; all shapes of one size have nearly the same area.
EXTENT = {"ball": (1.0, 1.0), "plank": (1.6, 0.52), "pole": (0.52, 1.6)}
DIRECTION = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "stays": (0, 0)}
HORIZON = 30.0
# A faded picture keeps this share of its contrast around a grey, and is blurred by so many pixels.
FADE, GREY, BLUR = 0.45, 150.0, 1.2


def wash(colours: np.ndarray) -> np.ndarray:
    """Colours (…, 3) as a faded picture shows them."""
    return FADE * colours + (1 - FADE) * GREY


def draw_clip(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A clip of the scene: uint8 RGB (FRAMES, SIDE, SIDE, 3).

    Where the thing begins and ends follows from its motion; its place in the frame, its size, the horizon and
    the ground's texture vary a little by chance.
    """
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    clip = np.repeat(_ground(scene.place, y, x, rng)[None], FRAMES, axis=0)
    radius = RADIUS[scene.size] * rng.uniform(0.95, 1.05)
    width, height = (radius * e for e in EXTENT[scene.shape])
    centre = SIDE / 2 + rng.uniform(-1.5, 1.5, 2)
    toward = np.array(DIRECTION[scene.motion], float)
    # As far as the frame allows, with a margin of two pixels and a half.
    way = np.minimum(16.0, SIDE / 2 - np.array([width, height]) - 2.5) * toward
    for i, frame in enumerate(clip):
        cx, cy = centre + way * (2 * i / (FRAMES - 1) - 1)
        inside = _inside(scene.shape, x - cx, y - cy, width, height)[..., None]
        frame[:] = frame * (1 - inside) + np.array(THINGS[scene.colour]) * inside
    if scene.look == "faded":
        clip = gaussian_filter(wash(clip), (0, BLUR, BLUR, 0))
    clip += rng.normal(0, 1.0, clip.shape)
    return clip.round().clip(0, 255).astype(np.uint8)


def _ground(place: str, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sky, ground = (np.array(c, float) for c in GROUNDS[place])
    horizon = HORIZON + rng.uniform(-2, 2)
    below = np.clip(y - horizon + 0.5, 0, 1)[..., None]
    # Waves, blades of grass, dunes: a stripe pattern of one direction for each place.
    along = {"sea": 1.1 * y, "meadow": 1.3 * x, "desert": 0.35 * (x + 2 * y), "night": 0.8 * (x - y)}[place]
    texture = 7 * np.sin(along + rng.uniform(0, 6.28))[..., None]
    return sky * (1 - below) + (ground + texture) * below


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, width: float, height: float) -> np.ndarray:
    """Share of each pixel that the thing covers, from its signed distance."""
    if shape == "ball":
        distance = np.hypot(dx, dy) - width
    else:
        round_by = 1.5
        qx, qy = np.abs(dx) - width + round_by, np.abs(dy) - height + round_by
        outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
        distance = outside + np.minimum(np.maximum(qx, qy), 0) - round_by
    return np.clip(0.5 - distance, 0, 1)
