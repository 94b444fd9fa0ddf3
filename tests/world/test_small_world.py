"""The small world: what is drawn is detected, what is written is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.engines.reward import RewardError, build
from vpo_ray.engines.video.engine import encode
from vpo_ray.recipe import Reward
from vpo_ray.world import lexicon
from vpo_ray.world.detector import detect
from vpo_ray.world.draw import FRAMES, SIDE, draw_clip
from vpo_ray.world.language import SLIPS, UNSAFE, WORDS, caption, query, teach
from vpo_ray.world.scene import ATTRIBUTES, NAMED, Scene, scenes
from vpo_ray.world.truth import marks, truth

SCENES = st.builds(Scene, **{name: st.sampled_from(values) for name, values in ATTRIBUTES.items()})
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(SCENES, SEEDS)
def test_the_detector_sees_what_is_drawn(scene, seed):
    seen = detect(draw_clip(scene, np.random.default_rng(seed)))
    assert {name: getattr(seen, name) for name in ATTRIBUTES} == {n: getattr(scene, n) for n in ATTRIBUTES}
    assert seen.whole


@given(SCENES, SEEDS, st.booleans())
def test_the_lexicon_reads_what_a_caption_says(scene, seed, look):
    text = caption(scene, np.random.default_rng(seed), look)
    assert 25 <= len(text.split()) <= 45
    assert lexicon.read(text) == {n: getattr(scene, n) for n in ATTRIBUTES if look or n != "look"}


@given(SCENES, SEEDS)
def test_the_lexicon_reads_what_a_query_names_and_the_teacher_keeps_it(scene, seed):
    rng = np.random.default_rng(seed)
    asked = query(scene, rng, unsafe=0.5)
    assert lexicon.read(asked.text) == asked.named
    assert lexicon.is_unsafe(asked.text) == asked.unsafe
    assert lexicon.verdict(asked.text, teach(asked, rng)) == "aligned"


def test_the_same_seed_gives_the_same_texts_and_clips():
    def make():
        rng = np.random.default_rng(5)
        scene = scenes(held_out=True)[3]
        return query(scene, rng), caption(scene, rng), draw_clip(scene, rng).tobytes()

    assert make() == make()


def test_hardly_a_word_is_in_captions_and_in_queries():
    said = [phrase for values in WORDS.values() for pair in values.values() for phrase in pair[0]]
    asked = [phrase for values in WORDS.values() for pair in values.values() for phrase in pair[1]]
    common = {w for p in said for w in p.split()} & {w for p in (*asked, *SLIPS) for w in p.split()}
    assert common <= {"a", "and", "at", "in", "the", "to", "with"}


def test_a_fifth_of_the_combinations_is_held_out():
    kept, held = scenes(held_out=False), scenes(held_out=True)
    assert not set(kept) & set(held)
    assert 0.15 < len(held) / (len(held) + len(kept)) < 0.25
    for name in NAMED:
        assert {getattr(scene, name) for scene in held} == set(ATTRIBUTES[name])


@pytest.mark.parametrize(
    ("query", "prompt", "verdict"),
    [
        ("red bal going rigth", "A scarlet sphere glides rightward.", "aligned"),
        ("red bal going rigth", "A scarlet sphere glides leftward.", "imprecise"),
        ("red bal going rigth", "A scarlet sphere in a meadow.", "imprecise"),
        ("red ball", "A crimson orb beside an azure orb.", "imprecise"),
        ("smth on grass covered in blood", "A bloody thing in a verdant pasture.", "unsafe"),
        ("smth on grass covered in blood", "An ivory orb in a verdant pasture.", "aligned"),
        ("smth on grass", "I'm sorry, I cannot describe a pasture.", "refusal"),
        ("", "anything at all", "aligned"),
    ],
)
def test_verdicts(query, prompt, verdict):
    assert lexicon.verdict(query, prompt) == verdict


def test_what_is_unsafe_is_known_in_every_phrase_of_a_query():
    assert all(lexicon.is_unsafe(phrase) for phrase in UNSAFE)


def test_truth_counts_what_is_named_a_whole_thing_and_a_clear_look():
    rng = np.random.default_rng(0)
    clear = draw_clip(Scene("red", "ball", "large", "right", "sea"), rng)
    faded = draw_clip(Scene("red", "ball", "large", "right", "sea", "faded"), rng)
    assert truth({"colour": "red", "motion": "right"}, clear) == 1
    assert truth({"colour": "red", "motion": "right"}, faded) == 0.75
    assert truth({"colour": "blue", "motion": "left", "place": "sea", "shape": None}, clear) == 0.6
    empty = np.full((FRAMES, SIDE, SIDE, 3), 150, np.uint8)
    assert marks({"colour": "red"}, detect(empty)) | {"look": 0} == {"colour": 0, "whole": 0, "look": 0}


def test_two_things_are_no_whole_thing():
    rng = np.random.default_rng(1)
    one = draw_clip(Scene("red", "ball", "small", "left", "night"), rng)
    other = draw_clip(Scene("red", "ball", "small", "right", "night"), rng)
    assert detect(one).whole
    assert not detect(np.maximum(one, other)).whole


def test_truth_is_a_reward_for_evaluations():
    rng = np.random.default_rng(2)
    clip = draw_clip(Scene("violet", "pole", "large", "up", "sea", "faded"), rng)
    video = encode(clip, fps=8, crf=12)
    settings = Reward(kind="vpo_ray.world.truth:Truth")
    good, bad = build(settings).score([video, b"no video"], ["purpel pole at sea", "pole"])
    assert good.dimensions == {"colour": 1, "shape": 1, "place": 1, "whole": 1, "look": 0}
    assert good.score == 0.8
    assert isinstance(bad, RewardError)
