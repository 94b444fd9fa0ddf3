"""What a clip of the small world shows: one thing, and six attributes of it and of its surroundings."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "yellow", "green", "blue", "violet", "white"),
    "shape": ("ball", "plank", "pole"),
    "size": ("small", "large"),
    "motion": ("right", "left", "up", "down", "stays"),
    "place": ("meadow", "sea", "night", "desert"),
    "look": ("clear", "faded"),
}
# Users name these; nobody asks for a look, and everybody wants "clear".
NAMED = ("colour", "shape", "size", "motion", "place")


@dataclass(frozen=True)
class Scene:
    """One value of `ATTRIBUTES` for each attribute."""

    colour: str
    shape: str
    size: str
    motion: str
    place: str
    look: str = "clear"

    @property
    def held_out(self) -> bool:
        """Whether no training clip has this combination of colour, shape, motion and place (a fifth)."""
        text = f"{self.colour} {self.shape} {self.motion} {self.place}"
        return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def scenes(held_out: bool, look: str = "clear") -> list[Scene]:
    """All combinations with this look that are held out, or all that are not."""
    values = itertools.product(*(ATTRIBUTES[name] for name in NAMED))
    every = (Scene(*named, look) for named in values)  # type: ignore[call-arg]
    return [scene for scene in every if scene.held_out == held_out]
