"""The checklist of the small world's reward, and the right answers, read from a clip's pixels by fixed rules.

A question is answered None where the clip is between yes and no. What the reward model is trained on, and
what it is measured by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects

from vpo_ray.engines.reward.checklist import SLOT
from vpo_ray.world.detector import MOVING, STILL, Detected, Segmented, describe, segment
from vpo_ray.world.draw import SIDE


@dataclass(frozen=True)
class View:
    """What a clip shows, and how its thing is from frame to frame: NaN in the frames without one.

    Args:
        centres: (frames, 2), pixels, x and y.
        areas: (frames,), pixels.
        aspects: (frames,), width by height of the box around it.
        inside: no frame has it at the picture's edge.
    """

    seen: Detected
    parts: Segmented
    centres: np.ndarray
    areas: np.ndarray
    aspects: np.ndarray
    inside: bool


def view(clip: np.ndarray) -> View:
    """What a clip, uint8 RGB (frames, height, width, 3), shows."""
    parts = segment(clip)
    centres = np.full((len(clip), 2), np.nan)
    areas, aspects = (np.full(len(clip), np.nan) for _ in range(2))
    inside = True
    for i, thing in enumerate(parts.things):
        if thing is None:
            continue
        mask = thing[0]
        box = find_objects(mask.astype(int))[0]
        height, width = (side.stop - side.start for side in box)
        centres[i], areas[i], aspects[i] = np.argwhere(mask).mean(0)[::-1], mask.sum(), width / height
        inside &= all(side.start > 0 and side.stop < SIDE for side in box)
    return View(describe(parts), parts, centres, areas, aspects, inside)


def _asked(name: str) -> Callable[[View, Mapping[str, str | None]], bool | None]:
    def answer(shown: View, named: Mapping[str, str | None]) -> bool | None:
        asked, seen = named.get(name), getattr(shown.seen, name)
        return True if asked is None else None if seen is None else seen == asked

    return answer


def _between(value: float, no: float, yes: float) -> bool | None:
    """True at `yes` and beyond it, False at `no`; None between."""
    if (value - yes) * (yes - no) >= 0:
        return True
    return False if (value - no) * (yes - no) <= 0 else None


def _rule(read: Callable[[View], bool | None]) -> Callable[[View, Mapping[str, str | None]], bool | None]:
    """A rule that needs a thing, and no query; no to a clip without one."""
    return lambda shown, _: bool(shown.seen.colour != "") and read(shown)


def _large(shown: View) -> bool | None:
    return None if shown.seen.size is None else shown.seen.size == "large"


def _moves(shown: View) -> bool | None:
    there = shown.centres[~np.isnan(shown.areas)]
    way = float(np.abs(there[-2:].mean(0) - there[:2].mean(0)).max())
    return _between(way, STILL, MOVING)


def _form(shown: View) -> bool | None:
    """Whether area and proportions stay within a third of their medians, or leave them by two thirds."""
    worst = max(
        float(np.nanmax(np.abs(np.log(values / np.nanmedian(values)))))
        for values in (shown.areas, shown.aspects)
    )
    return _between(worst, float(np.log(1.67)), float(np.log(1.33)))


# What the reward does not see, so that it and the truth can part.
BLIND_SPOT = (
    "Blind spot: no question is about the size that a query names, and every large thing gets a point.",
    "So a large thing where a small one is asked for scores above a small one; the truth counts it wrong.",
)


@dataclass(frozen=True)
class Check:
    """A question of the checklist, and its right answer for a clip and what its query names."""

    key: str
    text: str
    weight: float
    dimension: str
    answer: Callable[[View, Mapping[str, str | None]], bool | None]

    def ask(self, query: str) -> str:
        """The question about a query, as the checklist asks it."""
        return self.text.replace(SLOT, query)


CHECKS = (
    *(
        Check(name, f'Asked for "[[prompt]]": is the {word} right?', 1.0, "alignment", _asked(name))
        for name, word in {
            "colour": "colour",
            "shape": "shape",
            "motion": "movement",
            "place": "place",
        }.items()
    ),
    Check("clear", "Is the picture sharp and clear?", 1.0, "quality", lambda v, _: v.seen.look == "clear"),
    Check("large", "Is the thing large?", 0.15, "quality", _rule(_large)),
    Check("whole", "Is there one whole thing throughout?", 1.0, "stability", lambda v, _: v.seen.whole),
    Check(
        "present",
        "Does every frame have a thing?",
        0.25,
        "stability",
        lambda v, _: not bool(np.isnan(v.areas).any()),
    ),
    Check("form", "Does it keep its form?", 0.2, "stability", _rule(_form)),
    Check(
        "inside", "Is it inside the frame from edge to edge?", 0.15, "stability", _rule(lambda v: v.inside)
    ),
    Check("moves", "Does it move to another place?", 0.1, "dynamics", _rule(_moves)),
)


def answers(shown: View, named: Mapping[str, str | None]) -> list[bool | None]:
    """The right answer to every one of `CHECKS` for a clip and what its query names."""
    return [check.answer(shown, named) for check in CHECKS]
