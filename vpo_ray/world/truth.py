"""How well a clip gives what a query asks for: the figure that the reward model only estimates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vpo_ray.world.detector import Detected, detect


def marks(named: Mapping[str, str | None], seen: Detected) -> dict[str, float]:
    """1 right, 0 wrong, 0.5 where the clip is between two values, for each attribute that is named, for
    `whole` (one whole thing throughout) and for `look` (clear)."""
    given = {
        name: 0.5 if (value := getattr(seen, name)) is None else float(value == asked)
        for name, asked in named.items()
        if asked is not None
    }
    return given | {"whole": float(seen.whole), "look": float(seen.look == "clear")}


def truth(named: Mapping[str, str | None], clip: np.ndarray) -> float:
    """The mean of `marks` of a clip, uint8 RGB (frames, height, width, 3): from 0 to 1."""
    return float(np.mean(list(marks(named, detect(clip)).values())))
