"""What the world's judge is trained on: queries with prompts of every kind, and a perfect judge's answers.

The answers come from the lexicon. A critique first spells out what was read, attribute by attribute, so that
a small model has only to compare two words when it comes to the lists and the verdict.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from vpo_ray.files.text_files import read_lines
from vpo_ray.prompts.material import fill
from vpo_ray.world import lexicon
from vpo_ray.world.language import CAPTIONS, UNSAFE, WORDS, Query, caption, complete, query, teach
from vpo_ray.world.scene import ATTRIBUTES, NAMED, Scene
from vpo_ray.world.tiny import DATA

CRITIQUE = "Check the prompt against the request.\nrequest: {query}\nprompt: {prompt}"
REFINE = "Repair the prompt for the request.\nrequest: {query}\nprompt: {prompt}\ncritique: {critique}"

# What never changes in requests, answers and captions: a token each, so that little is left to be read.
FIXED = (
    *(piece.strip(" ") for text in (CRITIQUE, REFINE) for piece in re.split(r"{\w+}", text) if piece),
    '{"critique": "refusal',
    ", harm",
    *(f", {name} asked" for name in ATTRIBUTES),
    " said",
    '", "missing": [',
    *(f'{quote}], "added": [], "verdict": "' for quote in ('"', "")),
    '{"prompt": "',
    *(piece.rstrip() for text in CAPTIONS for piece in re.split(r"{\w+}", text) if len(piece.split()) > 1),
)

# Sentences as a general language model writes them; what a pair does not say is left out of its slot.
_PROSE = (
    "A {size} {colour} {shape} {motion} {place}.",
    "A {colour} {shape} is {motion} {place}. It is {size} and the light is soft.",
    "The video shows a {size} {shape} {motion}. The {shape} is {colour}, and the scene is set {place}.",
    "{place}, a {colour} {shape} {motion} slowly. The picture is {look}.",
    "Create a video of a {size}, {colour} {shape} {motion}, with a background of {place}. Style: {look}.",
    "I want to see a {shape}, {colour} and {size}, {motion} {place}",
    "The camera follows the {shape} as it keeps {motion}. Its {colour} surface shines {place} under an open "
    "sky. The {size} {shape} is the only thing that we see, and the view is {look}.",
    "Here is a caption: {size} {colour} {shape}, {motion}, {place}, {look}",
    "make {size} {colour} {shape} {motion} {place}",
    "Scene: {place}\nObject: {size} {colour} {shape}\nAction: {motion}\nLook: {look}",
)
_REFUSALS = (
    "I'm sorry, I cannot help with that.",
    "I can't create a video of this.",
    "I am sorry, but I won't describe that.",
    "As a language model, I am unable to write such a prompt.",
    "I cannot fulfil this request, as it is not safe.",
)
_NO_REFUSALS = ("Sorry, here it is.", "I can describe this.", "It cannot be seen from afar.", "I will try.")
_OTHER_WORDS = """
sky clouds sun moon stars light shadow slowly gently smoothly quickly across through around behind between
camera scene background foreground video clip shot view frame horizon distance air wind shining glowing
floating bouncing rolling spinning drifting resting lying turning surface texture colour color shape size
object person man woman dog cat tree trees flowers hills mountains road house window wall floor ground path
beautiful bright warm cool soft gentle quiet calm simple single whole high low long short wide close deep
natural realistic cinematic detailed style mood feeling atmosphere effect detail focus angle moment time day
morning evening winter summer caption request prompt description following keep names unsafe and with while
against under near its their that which there this these from into for of is are was as by it
"""
_FILLER = tuple(_OTHER_WORDS.split())
_T = TypeVar("_T")


def pair(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    """A query for one of the scenes, and a prompt that somebody may have written for it."""
    names = (1, 5) if rng.random() < 0.3 else (2, 4)
    asked = query(_pick(scenes, rng), rng, unsafe=0.18, names=names)
    if rng.random() < 0.04:
        asked = Query(_soup(asked.named, rng))
    return asked.text, _disturbed(_prompt(asked, rng), asked, rng)


def judged(query: str, prompt: str) -> dict[str, Any]:
    """The answer of a perfect judge to its critique prompt."""
    asked, said = lexicon.read(query), lexicon.read(prompt)
    harm = next(iter(lexicon.unsafe_words(prompt)), "none")
    broken = lexicon.broken(asked, prompt)
    slots = [f"refusal {'yes' if lexicon.is_refusal(prompt) else 'no'}", f"harm {harm}"]
    for name in ATTRIBUTES:
        wanted = (asked[name] or "two") if name in asked else "any"
        seen = (said[name] or "two") if name in said else "none"
        mark = "broken" if name in broken else "kept" if asked.get(name) else "free"
        slots.append(f"{name} asked {wanted} said {seen} {mark}")
    return {
        "critique": ", ".join(slots),
        "missing": [f"{name} {asked[name]}" for name in broken],
        "added": [],
        "verdict": lexicon.verdict(query, prompt),
    }


def repaired(query: str, prompt: str) -> str:
    """A caption that keeps what is asked, and of the rest what the prompt says.

    What neither says is chosen by the first two attributes that are asked: a model that always gives the
    likeliest answer can learn that, and over many queries all choices come, the look's too.
    """
    asked, said = lexicon.read(query), lexicon.read(prompt)
    known = {name: value for name in ATTRIBUTES if (value := asked.get(name) or said.get(name))}
    key = [value for name in ATTRIBUTES if (value := asked.get(name))][:2]
    rng = np.random.default_rng(zlib.crc32(" ".join(key).encode()))
    look = _pick(("clear", "faded", ""), rng)
    chosen = {**vars(complete({}, rng)), "look": look, **known}
    return caption(Scene(**{**chosen, "look": chosen["look"] or "clear"}), rng, look=bool(chosen["look"]))


def critique_request(query: str, prompt: str) -> str:
    return fill(CRITIQUE, query=query, prompt=prompt)


def refine_request(query: str, prompt: str, found: dict[str, Any]) -> str:
    """As the judge stage asks, where `found` is the answer to the critique."""
    lines = [found["critique"], *(f"missing: {detail}" for detail in found["missing"])]
    return fill(REFINE, query=query, prompt=prompt, critique="\n".join(lines))


def examples(query: str, prompt: str) -> list[tuple[str, str]]:
    """What the judge is asked of a pair, with its answers: a critique, and a repair where one is needed."""
    found = judged(query, prompt)
    asked = [(critique_request(query, prompt), json.dumps(found))]
    if found["verdict"] != "aligned":
        answer = json.dumps({"prompt": repaired(query, prompt)})
        asked.append((refine_request(query, prompt, found), answer))
    return asked


def _prompt(asked: Query, rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.3:
        return teach(asked, rng)
    if kind < 0.45:
        return _altered(asked, rng)
    if kind < 0.6:
        return _spliced(asked, rng)
    if kind < 0.82:
        said = {name: value for name, value in _about(asked.named, rng).items() if rng.random() < 0.9}
        slots = {name: _phrase(name, said[name], rng) if name in said else "" for name in ATTRIBUTES}
        return re.sub(
            " +", " ", _pick(_PROSE if rng.random() < 0.6 else CAPTIONS, rng).format(**slots)
        ).strip()
    if kind < 0.87:
        return asked.text
    return _soup(_about(asked.named, rng), rng)


def _altered(asked: Query, rng: np.random.Generator) -> str:
    """A caption with one or two values changed, or without a phrase."""
    scene = complete(asked.named, rng, look=_pick(ATTRIBUTES["look"], rng))
    names = tuple(asked.named) or NAMED
    if rng.random() < 0.35:
        text = caption(scene, rng)
        name = _pick(names, rng)
        for phrase in WORDS[name][getattr(scene, name)][0]:
            text = text.replace(phrase, _pick(("", *_FILLER), rng))
        return re.sub(" +", " ", text)
    changed = {name: _pick(ATTRIBUTES[name], rng) for name in rng.choice(names, rng.integers(1, 3))}
    return caption(Scene(**{**vars(scene), **changed}), rng, look=bool(rng.integers(2)))


def _spliced(asked: Query, rng: np.random.Generator) -> str:
    """The beginning of a caption and the end of another, as policies mix what they know; or a caption with
    a word or two changed for others of the same attribute."""
    words = teach(asked, rng).split(" ")
    if rng.random() < 0.5:
        names = [name for name in asked.named if rng.random() < 0.7]
        other = complete(
            {name: asked.named[name] for name in names}, rng, look=_pick(ATTRIBUTES["look"], rng)
        )
        end = caption(other, rng).split(" ")
        at = rng.random()
        skipped = min(max(at + rng.normal(0, 0.15), 0), 1)
        return " ".join([*words[: int(at * len(words))], *end[int(skipped * len(end)) :]])
    for _ in range(int(rng.integers(1, 3))):
        known = [i for i, word in enumerate(words) if word.strip(".,") in lexicon.VOCABULARY]
        at = _pick(known, rng)
        name, _ = lexicon.VOCABULARY[words[at].strip(".,")]
        words[at] = _pick(_words()[name, _pick(ATTRIBUTES[name], rng)], rng)
    return " ".join(words)


def _about(named: dict[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Mostly what is named, and something of the rest."""
    said = {
        name: value if rng.random() < 0.92 else _pick(ATTRIBUTES[name], rng) for name, value in named.items()
    }
    rest = {
        n: _pick(values, rng) for n, values in ATTRIBUTES.items() if n not in named and rng.random() < 0.4
    }
    return {**said, **rest}


def _phrase(name: str, value: str, rng: np.random.Generator) -> str:
    captions, queries = WORDS[name][value]
    kind = rng.random()
    if kind < 0.4 and queries:
        return _pick(queries, rng)
    return _pick(captions, rng) if kind < 0.6 else _pick(_words()[name, value], rng)


def _soup(said: dict[str, str], rng: np.random.Generator) -> str:
    """Sentences and words of no meaning here, with some phrases among them."""
    parts = [_pick(_sentences(), rng) for _ in range(rng.integers(3))]
    parts += [_filler(rng) for _ in range(rng.integers(4, 40))]
    for name, value in said.items():
        if rng.random() < 0.7:
            parts.insert(int(rng.integers(len(parts) + 1)), _phrase(name, value, rng))
    return " ".join(parts)


def _disturbed(text: str, asked: Query, rng: np.random.Generator) -> str:
    """The prompt as it is, or cut, repeated, contradicted, harmful or a refusal."""
    kind = rng.random()
    words = text.split(" ")
    if kind < 0.07:
        text = " ".join(words[: int(rng.integers(1, len(words) + 1))])
    elif kind < 0.12:
        start = int(rng.integers(len(words)))
        text = " ".join([*words, *words[start : start + 12] * int(rng.integers(1, 4))])
    elif kind < 0.2:
        name = _pick(tuple(ATTRIBUTES), rng)
        words.insert(int(rng.integers(len(words) + 1)), _phrase(name, _pick(ATTRIBUTES[name], rng), rng))
        text = " ".join(words)
    elif kind < 0.24:
        at = int(rng.integers(len(words)))
        words[at] = _mangled(words[at], rng)
        text = " ".join(words)
    elif kind < 0.27:
        text = f"{_pick(_NO_REFUSALS, rng)} {text}"
    elif kind < 0.29:
        text = text.title() if rng.integers(2) else text.lower()
    if rng.random() < (0.45 if asked.unsafe else 0.06):
        kept = [phrase for phrase in UNSAFE if phrase in asked.text and rng.random() < 0.8]
        harm = _pick(kept or (*UNSAFE, *sorted(lexicon.UNSAFE_WORDS)), rng)
        words = text.split(" ")
        words.insert(len(words) if rng.integers(2) else int(rng.integers(len(words))), harm)
        text = " ".join(words)
    if rng.random() < 0.06:
        text = _pick((_pick(_REFUSALS, rng), f"{_pick(_REFUSALS, rng)} {text}"), rng)
    return text


def _filler(rng: np.random.Generator) -> str:
    word = _pick(_FILLER, rng)
    return _mangled(_pick(tuple(lexicon.VOCABULARY), rng), rng) if rng.random() < 0.03 else word


def _mangled(word: str, rng: np.random.Generator) -> str:
    """The word with a letter changed, doubled or left out."""
    at = int(rng.integers(max(len(word), 1)))
    letter = _pick(("", "abcdefghijklmnopqrstuvwxyz"[int(rng.integers(26))], word[at : at + 1] * 2), rng)
    return word[:at] + letter + word[at + 1 :]


@cache
def _words() -> dict[tuple[str, str], tuple[str, ...]]:
    words: dict[tuple[str, str], list[str]] = {}
    for word, meaning in lexicon.VOCABULARY.items():
        words.setdefault(meaning, []).append(word)
    return {meaning: tuple(known) for meaning, known in words.items()}


@cache
def _sentences() -> tuple[str, ...]:
    prompts = [json.loads(line)["prompt"] for line in read_lines(DATA / "sft.jsonl")]
    return tuple(sentence for prompt in prompts for sentence in re.split(r"(?<=\.) ", prompt))


def _pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    return options[int(rng.integers(len(options)))]
