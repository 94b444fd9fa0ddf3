"""Flags leave the text and nothing is lost; what is no flag stays text."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.flags import Flag, join_flags, split_flags

REAL = Path(__file__).parents[2] / "shared/data/vpo/sft_prompts.json"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/data/vpo is not beside this checkout")

WORDS = [
    "cat",
    "sci-fi",
    "8k",
    "slow-motion",
    "-",
    "—",
    ",",
    ".",
    "\n",
    "[",
    "]",
    '"x"',
    "猫",
    "Clueless -Style",
]
FLAGS = [
    "-ar 16:9",
    "--ar 9:16",
    "—ar 2:3",
    "-ar",
    "-ar16:9",
    "-gs20",
    "-fps24-ar 1:1",
    "-neg",
    "-neg, blur, text",
    "--no people",
    "-camera zoom in",
    "-cam: pan up right",
    "-motion",
    "-m 3",
    "-hide",
    "--v 5.1",
    "-zoom out",
    "--style raw",
    "-seed 12345678901234567890",
    "Message: HI (Font: MODERN)",
    "-message",
]
GAPS = ["", " ", "  ", ", "]
queries = st.lists(st.tuples(st.sampled_from(WORDS + FLAGS), st.sampled_from(GAPS)), max_size=10).map(
    lambda parts: "".join(word + gap for word, gap in parts).strip()
)


@pytest.mark.parametrize(
    ("query", "text", "flags"),
    [
        ("a cat", "a cat", []),
        ("neon rain -ar 16:9 -motion 2", "neon rain", [("ar", "16:9"), ("motion", "2")]),
        ("a jungle -neg blurry, low quality, text", "a jungle", [("neg", "blurry, low quality, text")]),
        ("bread -camera zoom in -fps 24", "bread", [("camera", "zoom in"), ("fps", "24")]),
        # Forms that people type: dashes, gaps, glued, in the middle, many, with other words
        ("lens, -ar:16:9, –motion=4", "lens", [("ar", "16:9"), ("motion", "4")]),
        ("road -fps24-ar 16:9 -", "road", [("fps", "24"), ("ar", "16:9")]),
        ("shining path--ar 16:9", "shining path", [("ar", "16:9")]),
        ("a dancer.-m 3 -gs18", "a dancer.", [("motion", "3"), ("gs", "18")]),
        ("-ar 9:16 a knight rides", "a knight rides", [("ar", "9:16")]),
        ("lights, –ar 16:9, shot at night", "lights shot at night", [("ar", "16:9")]),
        ("a car -neg body -neg face -ar 3:2", "a car", [("neg", "body"), ("neg", "face"), ("ar", "3:2")]),
        ("food –v 5.1 –s 500 –chaos 10", "food", [("v", "5.1"), ("stylize", "500"), ("chaos", "10")]),
        ("flat 3d, --tile --no people", "flat 3d", [("tile", ""), ("neg", "people")]),
        ("[pineapples dance, –gs 20 –ar 16:9]", "[pineapples dance ]", [("gs", "20"), ("ar", "16:9")]),
        ("rocket ,-camera zoom out", "rocket", [("camera", "zoom out")]),
        ("a train -zoom in -hide", "a train", [("camera", "zoom in"), ("hide", "")]),
        ("a street  Message: GO (Font: MODERN)", "a street", [("message", "GO (Font: MODERN)")]),
        ("one\ntwo -neg blur\nthree", "one\ntwo \nthree", [("neg", "blur")]),
        # Text
        ("slow-motion 2 people", "slow-motion 2 people", []),
        ("a 16:9 frame - seed 4 u", "a 16:9 frame - seed 4 u", []),
        ("Clueless -Style, sci-fi, 35-ares", "Clueless -Style, sci-fi, 35-ares", []),
        ("-camera: wide aerial shot", "-camera: wide aerial shot", []),
        ("-ar wide -motion HD -s 4k", "-ar wide -motion HD -s 4k", []),
        ("ends with -neg", "ends with -neg", []),
        ("well-no problem", "well-no problem", []),
    ],
)
def test_forms(query: str, text: str, flags: list[tuple[str, str]]) -> None:
    assert split_flags(query) == (text, tuple(Flag(*flag) for flag in flags))


def test_a_query_of_flags_only() -> None:
    assert split_flags("-ar 16:9 -gs 3") == ("", (Flag("ar", "16:9"), Flag("gs", "3")))
    assert join_flags("", [Flag("ar", "16:9"), Flag("hide", "")]) == "-ar 16:9 -hide"


@settings(max_examples=400, deadline=None)
@given(queries)
def test_what_is_joined_splits_the_same(query: str) -> None:
    text, flags = split_flags(query)
    assert split_flags(join_flags(text, flags)) == (text, flags)


@settings(max_examples=400, deadline=None)
@given(queries)
def test_no_word_is_lost(query: str) -> None:
    assert words(join_flags(*split_flags(query))) == words(query)


@given(st.text(max_size=200))
def test_any_text_splits(query: str) -> None:
    text, flags = split_flags(query)
    assert text == query or flags


def test_time_grows_with_length_only() -> None:
    long = "-neg blur " * 20_000 + "x" * 100_000 + " -ar" * 20_000
    text, flags = split_flags(long)
    assert len(flags) == 20_000
    assert text == ""


@real
def test_real_queries() -> None:
    found: Counter[str] = Counter()
    for query in json.loads(REAL.read_text("utf-8")):
        text, flags = split_flags(query.strip())
        assert split_flags(join_flags(text, flags)) == (text, flags)
        assert words(join_flags(text, flags)) == words(query)
        found.update(flag.name for flag in flags)
    # One more or less here is a form of a flag that is newly taken or lost.
    assert found["ar"] > 1300
    assert found["motion"] > 840
    assert found["neg"] > 290
    assert found["camera"] > 270


def words(text: str) -> Counter[str]:
    """The words of a query; of names, what they stand for."""
    names = {
        "m": "motion",
        "cam": "camera",
        "camer": "camera",
        "as": "ar",
        "aspect": "ar",
        "negative": "neg",
        "nge": "neg",
        "no": "neg",
        "version": "v",
        "s": "stylize",
        "q": "quality",
        "seeds": "seed",
    }
    found = re.findall(r"[^\W\d]+|\d+", text.lower())
    # A bare move is told as a camera's; a known name may be written in either spelling.
    return Counter(name for name in (names.get(word, word) for word in found) if name != "camera")


@pytest.mark.parametrize(
    "query",
    [
        "Message: x " * 20_000,
        "Message: a (Font: " * 10_000,
        "-gs " * 20_000 + "-ar 1:1" + " 5" * 20_000,
        "-neg a" * 30_000,
        "-camera zoom" + " " * 200_000,
    ],
)
def test_huge_queries_are_split_in_time_that_grows_with_them(query: str) -> None:
    began = time.process_time()
    split_flags(query)
    assert time.process_time() - began < 10  # about one second; with their square, minutes
