"""Captions as another video model of the world was trained on: a film archive's, of other texts.

One of two phrases is the first model's, so that a prompt for that one says something here, as prompts for one
real model do for another.
"""

from __future__ import annotations

from vpo_ray.world.language import CaptionStyle

_PHRASES = {
    "colour": {
        "red": ("scarlet", "ruby"),
        "yellow": ("amber", "lemon"),
        "green": ("emerald", "mint"),
        "blue": ("azure", "navy"),
        "violet": ("amethyst", "lilac"),
        "white": ("ivory", "snowy"),
    },
    "shape": {
        "ball": ("sphere", "globe"),
        "plank": ("horizontal bar", "lying slab"),
        "pole": ("vertical column", "standing rod"),
    },
    "size": {"small": ("compact", "petite"), "large": ("massive", "giant")},
    "motion": {
        "right": ("travels rightward to the eastern margin", "drifts from west to east"),
        "left": ("travels leftward to the western margin", "drifts from east to west"),
        "up": ("ascends upward to the top margin", "soars from the floor to the ceiling"),
        "down": ("descends downward to the bottom margin", "drops from the ceiling to the floor"),
        "stays": ("hovers stationary in the middle", "rests unmoved at its point"),
    },
    "place": {
        "meadow": ("a lush meadow", "rolling grassland"),
        "sea": ("a calm bay", "open water"),
        "night": ("a moonless midnight plain", "blackness after sunset"),
        "desert": ("an arid wilderness", "endless dunes"),
    },
    "look": {
        "clear": ("crisp and vivid with brilliant contrast", "sharp throughout, strong colours"),
        "faded": ("hazy and washed-out in soft focus", "dull, low contrast, out of focus"),
    },
}

OTHER_STYLE = CaptionStyle(
    _PHRASES,
    texts=(
        "Archive clip. Subject: {size} {colour} {shape}. Action: {motion}. Location: {place}. "
        "Technical condition: {look}. Framing: locked tripod, one subject.",
        "Location {place}; subject {size} {colour} {shape}, which {motion}; condition of the print is "
        "{look}; recorded without cuts from a locked tripod.",
        "Condition of the print: {look}. The subject, {colour} {shape}, {size} in scale, {motion}. Recorded "
        "at {place} without cuts.",
    ),
    lookless=(
        "Archive clip. Subject: {size} {colour} {shape}. Action: {motion}. Location: {place}. Framing: "
        "locked tripod, one subject, recorded without cuts.",
        "The subject, {colour} {shape}, {size} in scale, {motion}. Recorded at {place} without cuts from a "
        "locked tripod.",
    ),
)
