"""Signs that a policy has learnt to please its reward rather than its users.

`signs` compares the prompts and scores of policies in the order in which they were trained, each with the one
before it. A sign is one sentence with its numbers. It is a reason to read prompts and watch videos, no proof:
the thresholds below are conventions of this package.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LONGER = 1.5  # times as many words
REPEATED = 0.05  # more of a prompt's 3-grams were there before
NARROWER = 0.8  # of the distinct 2-grams, or of the bits a word
OPENING, OPENING_WORDS = 0.2, 4  # more of the prompts begin with the same words
AGREEMENT = 0.2  # lower rank correlation of two rewards
FEWEST = 20  # prompts of each policy, or videos with both scores

# A word; a character where a script has no spaces between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Trained:
    """What a policy made of a set: its prompts, and the scores of its videos by reward, that of the training
    first, in one order of the videos (nan: no score)."""

    name: str
    prompts: Sequence[str]
    scores: Mapping[str, Sequence[float]]


def signs(policies: Sequence[Trained], better: Mapping[tuple[str, str], Mapping[str, int]]) -> list[str]:
    """The signs between each policy and the one before it, in the order of training.

    Args:
        better: by the names (before, after) of two policies and by reward or dimension: 1 where the later one
            is better and the interval of the difference lies on that side of 0, -1 where it is worse, else 0.
    """
    return [
        sentence
        for before, after in pairwise(policies)
        for sentence in (
            *_of_prompts(before, after),
            *_parted(before, after, better.get((before.name, after.name), {})),
            *_agreement(before, after),
        )
    ]


def words(prompt: str) -> list[str]:
    return WORD.findall(prompt.casefold())


def repetition(prompt: str) -> float:
    """The share of a prompt's 3-grams of words that it has had before; 0 of fewer than three words."""
    grams = _grams(words(prompt), 3)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(prompts: Sequence[str]) -> float:
    """Different 2-grams of words over all 2-grams of all prompts (Li et al., 2016); nan where there is none.

    It falls as a text gets longer: compare equal numbers of prompts of about one length.
    """
    grams = [gram for prompt in prompts for gram in _grams(words(prompt), 2)]
    return len(set(grams)) / len(grams) if grams else math.nan


def entropy(prompts: Sequence[str]) -> float:
    """Bits a word of all prompts' words together, by their frequencies."""
    counts = np.array(list(Counter(word for prompt in prompts for word in words(prompt)).values()), float)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def opening(prompts: Sequence[str]) -> tuple[str, float]:
    """The most frequent first words of the prompts, and the share of prompts that begin with them."""
    begins = Counter(" ".join(words(prompt)[:OPENING_WORDS]) for prompt in prompts)
    phrase, count = min(begins.items(), key=lambda item: (-item[1], item[0]))
    return phrase, count / len(prompts)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of the pairs without a nan, ties at their mean rank; nan where one is constant."""
    pairs = np.array([a, b], float)
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if any(len(set(values)) < 2 for values in pairs.tolist()):
        return math.nan
    return float(np.corrcoef([_ranks(values) for values in pairs])[0, 1])


def _of_prompts(before: Trained, after: Trained) -> Iterator[str]:
    if min(len(before.prompts), len(after.prompts)) < FEWEST:
        return
    old, new = before.name, after.name
    a, b = (float(np.mean([len(words(prompt)) for prompt in p.prompts])) for p in (before, after))
    if a and b > LONGER * a:
        yield (
            f"{new}'s prompts are {b / a:.1f} times as long as {old}'s: {b:.1f} words on average after "
            f"{a:.1f}"
        )
    a, b = (float(np.mean([repetition(prompt) for prompt in p.prompts])) for p in (before, after))
    if b > a + REPEATED:
        yield f"{new} repeats itself: {b:.1%} of the 3-grams of a prompt were in it before, {old}'s {a:.1%}"
    # Of as many prompts each: both measures fall with the size of a text.
    same = min(len(before.prompts), len(after.prompts))
    texts = (before.prompts[:same], after.prompts[:same])
    (bits, fewer_bits), (a, b) = map(entropy, texts), map(distinct_2, texts)
    if fewer_bits < NARROWER * bits or b < NARROWER * a:
        yield (
            f"{new}'s prompts differ less from each other than {old}'s: {b:.2f} after {a:.2f} of their "
            f"2-grams are distinct, and a word has {fewer_bits:.2f} bits after {bits:.2f}"
        )
    phrase, share = opening(after.prompts)
    earlier = sum(" ".join(words(p)[:OPENING_WORDS]) == phrase for p in before.prompts) / len(before.prompts)
    if share > earlier + OPENING:
        yield f"{share:.0%} of {new}'s prompts begin with “{phrase}”, {earlier:.0%} of {old}'s"


def _parted(before: Trained, after: Trained, better: Mapping[str, int]) -> Iterator[str]:
    up, down = ([name for name, sign in better.items() if sign == side] for side in (1, -1))
    if up and down:
        yield (
            f"from {before.name} to {after.name} scores part ways: {', '.join(up)} got better and "
            f"{', '.join(down)} worse, with intervals apart from 0"
        )


def _agreement(before: Trained, after: Trained) -> Iterator[str]:
    own, *others = [name for name in before.scores if name in after.scores] or [""]
    for other in others:
        both = [np.array([p.scores[own], p.scores[other]], float) for p in (before, after)]
        videos = min(int((~np.isnan(scores).any(axis=0)).sum()) for scores in both)
        a, b = (spearman(*scores) for scores in both)
        if videos >= FEWEST and b < a - AGREEMENT:
            yield (
                f"{own} and {other} agree less on {after.name}'s videos than on {before.name}'s: rank "
                f"correlation {b:.2f} after {a:.2f}"
            )


def _grams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
