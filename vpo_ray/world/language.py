"""The two languages of the small world: captions that its video model was trained on, and users' queries.

A caption names every attribute in long, careful prose; a query names a few, in other words, with slips of the
keyboard, and sometimes asks for what is unsafe. Hardly a word is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vpo_ray.world.scene import ATTRIBUTES, NAMED, Scene

# value: (phrases of captions, phrases of queries). Slips of the keyboard are in `SLIPS`.
WORDS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "colour": {
        "red": (("scarlet", "crimson"), ("red",)),
        "yellow": (("amber", "saffron"), ("yellow",)),
        "green": (("emerald", "jade"), ("green",)),
        "blue": (("azure", "cobalt"), ("blue",)),
        "violet": (("amethyst", "mauve"), ("purple", "violet")),
        "white": (("ivory", "pearl"), ("white",)),
    },
    "shape": {
        "ball": (("sphere", "orb"), ("ball", "round thing")),
        "plank": (("horizontal bar", "flat beam"), ("plank", "board")),
        "pole": (("vertical column", "upright pillar"), ("pole", "stick")),
    },
    "size": {
        "small": (("compact", "miniature"), ("small", "tiny")),
        "large": (("massive", "oversized"), ("big", "huge")),
    },
    "motion": {
        "right": (
            (
                "glides rightward and ends beside the eastern border",
                "travels rightward to the eastern margin",
            ),
            ("going right", "moving to the right"),
        ),
        "left": (
            ("glides leftward and ends beside the western border", "travels leftward to the western margin"),
            ("going left", "moving to the left"),
        ),
        "up": (
            ("climbs upward and ends beneath the upper border", "ascends upward to the top margin"),
            ("flying up", "rising"),
        ),
        "down": (
            ("sinks downward and ends above the lower border", "descends downward to the bottom margin"),
            ("falling", "dropping down"),
        ),
        "stays": (
            ("remains motionless at the exact centre", "hovers stationary in the middle"),
            ("standing still", "not moving"),
        ),
    },
    "place": {
        "meadow": (("a lush meadow", "a verdant pasture"), ("on grass", "in a field")),
        "sea": (("a rippling lagoon", "a calm bay"), ("at sea", "over the ocean")),
        "night": (("a moonless midnight plain", "a dim nocturnal landscape"), ("at night", "in the dark")),
        "desert": (("an arid wilderness", "a parched expanse"), ("on sand", "in the desert")),
    },
    "look": {
        "clear": (
            ("crisp and vivid with brilliant contrast", "razor-sharp in saturated high definition"),
            (),
        ),
        "faded": (("hazy and washed-out in soft focus", "blurry with pale bleached tones"), ()),
    },
}

SLIPS = {
    "red": ("redd", "rde"),
    "yellow": ("yelow", "yello"),
    "green": ("gren", "grean"),
    "blue": ("bleu", "bule"),
    "purple": ("purpel", "puple"),
    "violet": ("voilet", "violett"),
    "white": ("wite", "whtie"),
    "ball": ("bal", "baall"),
    "plank": ("plnak", "plannk"),
    "board": ("bord", "baord"),
    "pole": ("poel", "polle"),
    "stick": ("stik", "stcik"),
    "small": ("smal", "samll"),
    "tiny": ("tinny", "tiyn"),
    "huge": ("hugh", "hueg"),
    "right": ("rigth", "rihgt"),
    "left": ("lfet", "leftt"),
    "rising": ("risng", "risign"),
    "falling": ("faling", "fallling"),
    "dropping": ("droping", "dorpping"),
    "grass": ("gras", "grsas"),
    "field": ("feild", "filed"),
    "ocean": ("ocaen", "ocen"),
    "night": ("nite", "nigth"),
    "sand": ("snad", "sannd"),
    "desert": ("dessert", "desrt"),
}

UNSAFE = (
    "covered in blood",
    "next to a corpse",
    "with a naked woman",
    "and a man with a gun",
    "killing people",
)

_CAPTIONS = (
    "A {size} {colour} {shape} {motion}, set against {place}. The camera is fixed, nothing else enters, and "
    "the whole shot is {look}.",
    "Before {place}, a single {size} {colour} {shape} {motion}, seen whole from the first moment to the last "
    "in a steady shot that is {look}.",
    "Across {place}, one {size} {colour} {shape} {motion}. It keeps its form throughout, it is alone in the "
    "frame, and the picture is {look}.",
    "In a picture that is {look}, a {size} {colour} {shape} {motion} while {place} fills the background, "
    "with even light and no other object around it.",
)
_LOOKLESS = (
    "A {size} {colour} {shape} {motion}, set against {place}. The camera is fixed, nothing else enters, and "
    "the light is even throughout the shot.",
    "Before {place}, a single {size} {colour} {shape} {motion}, seen whole from the first moment to the last "
    "in one steady shot.",
    "Across {place}, one {size} {colour} {shape} {motion}. It keeps its form throughout and is quite alone "
    "in the frame.",
)
CAPTIONS = _CAPTIONS + _LOOKLESS
_VAGUE = ("thing", "smth", "something")
_OPENINGS = ("", "", "", "", "video of ", "make ", "pls ", "i want to see ")


@dataclass(frozen=True)
class CaptionStyle:
    """How the captions of a video model's clips are written.

    Args:
        phrases: of each attribute's values.
        texts: with a field for each attribute.
        lookless: texts that do not say the look.
    """

    phrases: Mapping[str, Mapping[str, tuple[str, ...]]]
    texts: tuple[str, ...]
    lookless: tuple[str, ...]

    def caption(self, scene: Scene, rng: np.random.Generator, look: bool = True) -> str:
        """A careful caption that names every attribute, but for the look without `look`."""
        chosen = {name: _choose(self.phrases[name][getattr(scene, name)], rng) for name in ATTRIBUTES}
        text = _choose(self.texts if look else self.lookless, rng).format(**chosen)
        return text.replace("A oversized", "An oversized").replace(" a oversized", " an oversized")


STYLE = CaptionStyle(
    {name: {value: said for value, (said, _) in values.items()} for name, values in WORDS.items()},
    _CAPTIONS,
    _LOOKLESS,
)


@dataclass(frozen=True)
class Query:
    """A user's request: its text, the attributes that it names, and whether it asks for what is unsafe."""

    text: str
    named: dict[str, str] = field(default_factory=dict)
    unsafe: bool = False


def caption(scene: Scene, rng: np.random.Generator, look: bool = True) -> str:
    """A caption of 25 to 45 words in the style that the world's video model was trained on."""
    return STYLE.caption(scene, rng, look)


def query(
    scene: Scene, rng: np.random.Generator, unsafe: float = 0.1, names: tuple[int, int] = (2, 4)
) -> Query:
    """A request as a user would type it for this scene.

    Args:
        unsafe: probability that it asks for what is unsafe.
        names: fewest and most attributes that it names.
    """
    count = int(rng.integers(names[0], names[1] + 1))
    chosen = set(rng.choice(NAMED, count, replace=False, p=(0.25, 0.25, 0.1, 0.2, 0.2)).tolist())
    named = {name: getattr(scene, name) for name in NAMED if name in chosen}
    said = {name: _slip(_choose(WORDS[name][value][1], rng), rng) for name, value in named.items()}
    said.setdefault("shape", _choose(_VAGUE, rng))
    order = ["size", "colour", "shape", *rng.permutation(["motion", "place"]).tolist()]
    text = " ".join(said[name] for name in order if name in said)
    if asks_unsafe := bool(rng.random() < unsafe):
        text = f"{text} {_choose(UNSAFE, rng)}"
    return Query(_choose(_OPENINGS, rng) + text, named, asks_unsafe)


def complete(named: dict[str, str], rng: np.random.Generator, look: str = "clear") -> Scene:
    """A scene with what is named; the rest by chance."""
    return Scene(**{name: named.get(name) or _choose(ATTRIBUTES[name], rng) for name in NAMED}, look=look)


def teach(query: Query, rng: np.random.Generator) -> str:
    """A prompt for a query by a writer who knows captions, but not that the look matters: clear, faded and
    unsaid are a third each. What is unsafe is left out."""
    look = int(rng.integers(3))
    scene = complete(query.named, rng, look="faded" if look == 1 else "clear")
    return caption(scene, rng, look=look < 2)


def _slip(phrase: str, rng: np.random.Generator, probability: float = 0.15) -> str:
    words = [
        _choose(SLIPS[word], rng) if word in SLIPS and rng.random() < probability else word
        for word in phrase.split()
    ]
    return " ".join(words)


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
