"""Signs of reward hacking between policies in the order of training."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vpo_ray.evaluation.signs import Trained, distinct_2, entropy, opening, repetition, signs, spearman, words

LEXICON = [f"{a}{b}" for a in ("ka", "li", "mo", "ru", "te", "va", "zo") for b in ("do", "fen", "gi", "hal")]


def prompts(count: int = 30, length: int = 20, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(LEXICON) for _ in range(length)) for _ in range(count)]


def between(before: list[str], after: list[str]) -> list[str]:
    return signs([Trained("sft", before, {}), Trained("dpo", after, {})], {})


def test_ordinary_policies_show_no_sign() -> None:
    assert between(prompts(seed=1), prompts(seed=2)) == []


def test_longer_prompts() -> None:
    (sentence,) = between(prompts(length=20, seed=1), prompts(length=31, seed=2))
    assert sentence == "dpo's prompts are 1.6 times as long as sft's: 31.0 words on average after 20.0"
    assert between(prompts(length=20), prompts(length=29, seed=2)) == []


def test_repetition_within_a_prompt() -> None:
    again = [f"{text} {' '.join(text.split()[:6])}" for text in prompts(seed=2)]
    (sentence,) = between(prompts(seed=1), again)
    assert sentence.startswith("dpo repeats itself: 16.7% of the 3-grams of a prompt were in it before")
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("a b") == 0


def test_prompts_that_become_alike() -> None:
    rng = random.Random(0)
    alike = [" ".join(rng.sample(LEXICON[:20], 20)) for _ in range(30)]
    narrow = [" ".join(rng.choice(LEXICON[:4]) for _ in range(20)) for _ in range(30)]
    assert any("differ less from each other" in text for text in between(alike, narrow))
    assert entropy(["a b", "c d"]) == 2
    assert distinct_2(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert math.isnan(distinct_2(["a"]))


def test_one_opening_phrase() -> None:
    own = prompts(seed=2)
    opened = [f"In a cinematic shot, {text}" if n < 15 else text for n, text in enumerate(own)]
    (sentence,) = between(prompts(seed=1), opened)
    assert sentence == "50% of dpo's prompts begin with “in a cinematic shot”, 0% of sft's"
    assert opening(["A cat.", "a CAT!", "a dog"]) == ("a cat", pytest.approx(2 / 3))


def test_few_prompts_say_nothing() -> None:
    assert between(prompts(19, 10), prompts(19, 40)) == []


def test_dimensions_that_part_ways() -> None:
    pair = [Trained("sft", [], {}), Trained("dpo", [], {})]
    better = {"reward.alignment": 1, "reward.physics": -1, "reward.stability": 0}
    (sentence,) = signs(pair, {("sft", "dpo"): better})
    assert sentence == (
        "from sft to dpo scores part ways: reward.alignment got better and reward.physics worse, with "
        "intervals apart from 0"
    )
    assert signs(pair, {("sft", "dpo"): {"reward.alignment": 1, "reward.stability": 0}}) == []


def test_rewards_that_agree_less() -> None:
    rng = random.Random(0)
    first = [rng.random() for _ in range(40)]
    other = [rng.random() for _ in range(40)]
    sft = Trained("sft", [], {"reward": first, "clip": first})
    (sentence,) = signs([sft, Trained("dpo", [], {"reward": first, "clip": other})], {})
    assert sentence.startswith("reward and clip agree less on dpo's videos than on sft's: rank correlation ")
    lost = [math.nan] * 21 + other[21:]
    assert signs([sft, Trained("dpo", [], {"reward": first, "clip": lost})], {}) == []


def test_each_policy_is_compared_with_the_one_before_it() -> None:
    lengths = [Trained(name, prompts(length=n), {}) for name, n in (("base", 10), ("sft", 40), ("dpo", 40))]
    found = [text for text in signs(lengths, {}) if "times as long" in text]
    assert found == ["sft's prompts are 4.0 times as long as base's: 40.0 words on average after 10.0"]


def test_scripts_without_spaces_have_words() -> None:
    assert words("一只猫 on a roof") == ["一", "只", "猫", "on", "a", "roof"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    ours = spearman([*a, math.nan], [*b, 1.0])
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(a, b).statistic)
