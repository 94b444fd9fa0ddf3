"""The clips that the small world's reward is trained on and measured by, with the right answers.

Drawn ones, some of them spoiled as a video model spoils them, and rendered ones; all through the mp4 that the
reward reads in the product. What a clip shows is read from its pixels, never taken from what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation, gaussian_filter

from vpo_ray.engines.reward.frames import choose_frames, read_video
from vpo_ray.engines.video.engine import VideoEngine, encode
from vpo_ray.world.detector import segment
from vpo_ray.world.draw import FPS, FRAMES, SIDE, draw_clip
from vpo_ray.world.language import Query, caption, complete, query, teach
from vpo_ray.world.questions import CHECKS, View, view
from vpo_ray.world.scene import ATTRIBUTES, NAMED, Scene
from vpo_ray.world.train_video import render_settings

CRF = 12  # as the recipes' render.crf
FRAME_STRATEGY = 4.0  # frames a second that the reward sees: 5 of 9


@dataclass(frozen=True)
class Clips:
    """Clips as arrays; the first axis is the clip.

    Args:
        frames: uint8 (clips, 5, SIDE, SIDE, 3), those that the reward sees.
        asked: (clips, 5), index of each of `NAMED` in what was asked for.
        seen: (clips, 6), index of each of `ATTRIBUTES`; its number of values where there is no thing, and -1
            between two values.
        free: (clips, checks), 1 yes, 0 no and -1 between, for a query that names nothing.
        course: (clips, 5, 5), of each frame whether it has a thing, its centre's x and y in sides from
            the middle, the logarithms of its area in a twentieth of the frame and of its proportions.
    """

    frames: np.ndarray
    asked: np.ndarray
    seen: np.ndarray
    free: np.ndarray
    course: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def save(self, path: Path) -> None:
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Clips:
        with np.load(path) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})

    def with_(self, others: Clips) -> Clips:
        return Clips(*(np.concatenate([getattr(c, f.name) for c in (self, others)]) for f in fields(self)))

    def scene(self, clip: int, change: float, rng: np.random.Generator) -> Scene:
        """The scene that was asked for; with `change`, the one that is seen, each attribute another with this
        probability (and by chance where none is seen)."""
        found = {}
        for i, name in enumerate(NAMED):
            values, value = ATTRIBUTES[name], int((self.seen if change else self.asked)[clip, i])
            if not 0 <= value < len(values) or rng.random() < change:
                value = int(rng.integers(len(values)))
            found[name] = values[value]
        return Scene(**found)

    def answers(self, clip: int, named: dict[str, str]) -> np.ndarray:
        """(checks,), 1 yes, 0 no and -1 between, for a query that names this."""
        found = self.free[clip].copy()
        for i, check in enumerate(CHECKS):
            if check.key in named:
                value = int(self.seen[clip, NAMED.index(check.key)])
                asked = ATTRIBUTES[check.key].index(named[check.key])
                found[i] = -1 if value < 0 else value == asked
        return found

    def truth(self, clip: int, named: dict[str, str]) -> float:
        """`truth.truth` of a clip for a query that names this."""
        look, free = tuple(ATTRIBUTES).index("look"), {c.key: i for i, c in enumerate(CHECKS)}
        marks = [float(self.free[clip, free["whole"]]), float(self.seen[clip, look] == 0)]
        for name, asked in named.items():
            value = int(self.seen[clip, NAMED.index(name)])
            marks.append(0.5 if value < 0 else float(value == ATTRIBUTES[name].index(asked)))
        return float(np.mean(marks))


def read_clips(videos: Iterable[bytes], asked: Sequence[Scene]) -> Clips:
    """The clips of mp4 files, and the right answers."""
    rows = []
    for video, scene in zip(videos, asked, strict=True):
        clip, _ = read_video(video)
        shown = view(clip)
        chosen = choose_frames([i / FPS for i in range(len(clip))], FPS, FRAME_STRATEGY)
        course = np.column_stack(
            [
                ~np.isnan(shown.areas),
                shown.centres / SIDE - 0.5,
                np.log(shown.areas * 20 / SIDE**2),
                np.log(shown.aspects),
            ]
        )
        named = [ATTRIBUTES[name].index(getattr(scene, name)) for name in NAMED]
        seen = [_index(name, getattr(shown.seen, name)) for name in ATTRIBUTES]
        rows.append((clip[chosen], named, seen, _free(shown), np.nan_to_num(course[chosen])))
    types = (np.uint8, np.int8, np.int8, np.int8, np.float32)
    return Clips(
        *(np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), types, strict=True))
    )


def _index(name: str, value: str | None) -> int:
    return -1 if value is None else len(ATTRIBUTES[name]) if value == "" else ATTRIBUTES[name].index(value)


def _free(shown: View) -> list[int]:
    found = [check.answer(shown, {}) for check in CHECKS]
    return [-1 if answer is None else int(answer) for answer in found]


def drawn(count: int, seed: int, scenes: Sequence[Scene], spoil: float = 0.6) -> Clips:
    """Drawn clips of these scenes in either look, this share of them spoiled."""
    rng = np.random.default_rng(seed)
    videos, asked = [], []
    for _ in range(count):
        scene = scenes[int(rng.integers(len(scenes)))]
        look = ATTRIBUTES["look"][int(rng.integers(2))]
        clip = draw_clip(Scene(**{n: getattr(scene, n) for n in NAMED}, look=look), rng)
        if rng.random() < spoil:
            clip = spoiled(clip, scene, look, rng)
        videos.append(encode(clip, FPS, CRF))
        asked.append(scene)
    return read_clips(videos, asked)


def spoiled(clip: np.ndarray, scene: Scene, look: str, rng: np.random.Generator) -> np.ndarray:
    """A clip as a bad video model would make it: a thing too many, none, or one that vanishes, changes, is
    faint, jumps, or leaves the frame."""
    masks = _masks(clip)
    kind = rng.choice(["two", "none", "vanishes", "changes", "faint", "jumps", "leaves", "fades", "blurs"])
    some = np.zeros(FRAMES, bool)
    first = int(rng.integers(FRAMES - 1))
    some[first : first + int(rng.integers(2, FRAMES + 1))] = True
    ground = _erased(clip, masks)
    here = some[:, None, None, None]
    if kind in ("two", "changes"):
        other = complete({"place": scene.place}, rng, look)
        second = draw_clip(other, rng)
        if kind == "changes":
            return np.where(here, second, clip)
        move = tuple(rng.integers(-14, 15, 2))
        second, shown = (np.roll(array, move, axis=(1, 2)) for array in (second, _masks(second)))
        return np.where(shown[..., None] & here, second, clip)
    if kind == "none":
        return ground
    if kind == "vanishes":
        return np.where(here, ground, clip)
    if kind == "faint":
        share = rng.uniform(0.2, 0.8)
        return np.where(here, (share * clip + (1 - share) * ground).round().astype(np.uint8), clip)
    if kind == "jumps":
        return np.stack([np.roll(f, tuple(rng.integers(-5, 6, 2)), axis=(0, 1)) for f in clip])
    if kind == "leaves":
        return np.roll(clip, tuple(rng.integers(-30, 31, 2)), axis=(1, 2))
    if kind == "fades":
        share = rng.uniform(0.3, 1.0)
        mixed = share * clip + (1 - share) * 150.0
        return mixed.round().astype(np.uint8)
    return (
        gaussian_filter(clip.astype(np.float32), (0, b := rng.uniform(0.3, 1.5), b, 0))
        .round()
        .astype(np.uint8)
    )


def _masks(clip: np.ndarray) -> np.ndarray:
    return segment(clip).nearest >= 0


def _erased(clip: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The clip without its thing: the ground of the same height beside it."""
    wide = binary_dilation(masks, np.ones((1, 5, 5)))[..., None]
    return np.where(wide, np.roll(clip, SIDE // 2, axis=2), clip)


@dataclass(frozen=True)
class ClipGroup:
    """A query, the scene that it was made for, and mp4 files of several prompts for it, of one seed."""

    asked: Query
    scene: Scene
    videos: list[bytes]


def rendered(model: Path, count: int, seed: int, scenes: Sequence[Scene]) -> list[ClipGroup]:
    """Videos of the world's video model, four for a query, as the product renders them."""
    engine = VideoEngine(render_settings(model, crf=CRF, batch_size=4))
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        scene = scenes[int(rng.integers(len(scenes)))]
        asked = query(scene, rng)
        texts = prompts(asked, scene, rng)
        videos = engine.render(texts, [seed * 100_003 + number] * len(texts))
        good = [encode(video, FPS, CRF) for video in videos if not isinstance(video, Exception)]
        groups.append(ClipGroup(asked, scene, good))
    return groups


def read_groups(groups: Sequence[ClipGroup]) -> Clips:
    """The clips of groups, in order."""
    return read_clips([v for g in groups for v in g.videos], [g.scene for g in groups for _ in g.videos])


def prompts(asked: Query, scene: Scene, rng: np.random.Generator) -> list[str]:
    """Four prompts for a query: itself, two by a writer who knows captions, and a caption that keeps about
    half of what is named, or says two things at once."""
    kept = {name: value for name, value in asked.named.items() if rng.random() < 0.5}
    other = caption(complete(kept, rng, "faded" if rng.random() < 0.3 else "clear"), rng)
    if rng.random() < 0.25:
        other = f"{caption(scene, rng)} {other}"
    return [asked.text, teach(asked, rng), teach(asked, rng), other]
