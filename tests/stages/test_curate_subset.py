"""A diverse subset of the wanted size, its unsafe share, and what the data cannot give."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import Curated, InputError, curate, diversity
from vpo_ray.stages.curate.diversity import BleuPool, embed, farthest_first, least_self_bleu, terms, words_of

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "rt", "lk", "sh")]


def topics(count: int, rows: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts of `count` topics, a few of which have most of the rows, and the topic of each."""
    rng = random.Random(seed)
    vocabulary = [rng.sample(WORDS, 12) for _ in range(count)]
    of = [*range(count), *(int(count * rng.random() ** 4) for _ in range(rows - count))]
    return [" ".join(rng.sample(vocabulary[topic], 9)) for topic in of], of


def vectors(texts: list[str]) -> np.ndarray:
    found = [terms(text) for text in texts]
    return embed(np.cumsum([0, *map(len, found)]), np.concatenate(found))


def run(tmp_path: Path, values: list[Any], **options: Any) -> Curated:
    path = tmp_path / "queries.json"
    path.write_text(json.dumps(values), "utf-8")
    return curate(Queries(path=str(path), **options))


def kept(curated: Curated) -> list[dict[str, Any]]:
    return [row for part in curated.queries(1000) for row in part.to_pylist()]


def self_bleu(texts: list[str], row: int, order: int) -> float:
    """As BLEU is defined: clipped counts against every other text, geometric mean, smoothed."""

    def grams(text: str, size: int) -> Counter[tuple[str, ...]]:
        words = words_of(text)
        return Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))

    logs = []
    for size in range(1, min(order, len(words_of(texts[row]))) + 1):
        mine = grams(texts[row], size)
        others = [grams(text, size) for number, text in enumerate(texts) if number != row]
        clipped = sum(min(n, max((other[gram] for other in others), default=0)) for gram, n in mine.items())
        logs.append(math.log((clipped or 0.1) / mine.total()))
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


# Farthest first


@pytest.mark.parametrize("rows", [1200, 6000])
def test_more_topics_are_in_the_subset_than_by_chance(rows: int) -> None:
    texts, of = topics(60, rows)
    chosen = farthest_first(vectors(texts), 120)
    assert len(set(chosen.tolist())) == 120
    found = len({of[row] for row in chosen.tolist()})
    by_chance = [len({of[row] for row in random.Random(n).sample(range(rows), 120)}) for n in range(5)]
    assert found > 1.25 * max(by_chance)


def test_the_traversal_is_greedy() -> None:
    space = vectors(topics(30, 400)[0])
    chosen = farthest_first(space, 40)
    wide = space.astype(np.int64)
    for number in range(1, 40):
        gaps = ((wide[:, None] - wide[chosen[:number]][None]) ** 2).sum(axis=2).min(axis=1)
        gaps[chosen[:number]] = -1
        assert gaps[chosen[number]] == gaps.max()
    assert (farthest_first(space, 15) == chosen[:15]).all()


def test_many_cells_choose_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, of = topics(300, 5000)
    space = vectors(texts)
    alone = len({of[row] for row in farthest_first(space, 600).tolist()})
    monkeypatch.setattr(diversity, "_CELL", 128)
    assert len(diversity._cells(space, 600)) > 20
    assert len({of[row] for row in farthest_first(space, 600).tolist()}) >= 0.97 * alone


def test_rows_that_are_all_the_same() -> None:
    space = np.repeat(vectors(["a cat on a roof", "a dog"])[:1], 50, axis=0)
    assert sorted(farthest_first(space, 20).tolist()) == list(range(20))


def test_a_subset_of_everything() -> None:
    assert farthest_first(vectors(["one", "two", "three"]), 3).tolist() == [0, 1, 2]


def test_vectors_do_not_hang_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = topics(20, 300)
    whole = vectors(texts)
    monkeypatch.setattr(diversity, "_CHUNK", 7)
    assert (vectors(texts) == whole).all()


# Self-BLEU


def test_self_bleu_is_bleu_against_all_others() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices([*"abcdefg", "the", "猫"], k=rng.randrange(9))) for _ in range(30)]
    texts += ["a a a a", "a a cat cat", "!"]
    for order in (1, 2, 4):
        pool = BleuPool(texts, order)
        for row in range(len(texts)):
            assert pool.score(row) == pytest.approx(self_bleu(texts, row, order), abs=1e-12)


def test_the_most_alike_goes_again_and_again() -> None:
    texts, _ = topics(15, 60)
    left = list(range(len(texts)))
    for size in range(59, 20, -1):
        scores = [self_bleu([texts[row] for row in left], number, 3) for number in range(len(left))]
        left.pop(max(range(len(left)), key=lambda number: (round(scores[number], 12), left[number])))
        assert least_self_bleu(texts, size, 3).tolist() == left


def test_self_bleu_falls_below_that_of_chance(tmp_path: Path) -> None:
    texts, _ = topics(40, 400)
    for method in ("self_bleu", "farthest_first"):
        chosen = [row["query"] for row in kept(run(tmp_path, texts, size=80, diversity={"method": method}))]
        by_chance = random.Random(0).sample(texts, 80)
        mean, chance = (
            np.mean([BleuPool(group, 4).score(row) for row in range(80)]) for group in (chosen, by_chance)
        )
        assert mean < 0.8 * chance


def test_self_bleu_refuses_more_than_it_is_meant_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "MAX_SELF_BLEU", 50)
    with pytest.raises(InputError, match=r"self_bleu: 60 queries are more than the 50 it is meant for"):
        run(tmp_path, [f"query {number}" for number in range(60)], size=5, diversity={"method": "self_bleu"})


# Size and share


@pytest.mark.parametrize("method", ["farthest_first", "self_bleu"])
def test_exactly_so_many_whatever_their_order(tmp_path: Path, method: str) -> None:
    texts = sorted(set(topics(30, 300)[0]))
    subsets = []
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        curated = run(tmp_path, [*texts, ""], size=77, diversity={"method": method})
        assert curated.counts() == {"dpo": 77, "not in the subset": len(texts) - 77, "empty": 1}
        subsets.append({row["query_id"] for row in kept(curated)})
    assert subsets[0] == subsets[1] == subsets[2]


def test_the_unsafe_share(tmp_path: Path) -> None:
    values = [
        {"query": text, "p": (0.9 if number % 10 == 0 else None if number % 10 == 1 else 0.1)}
        for number, text in enumerate(sorted(set(topics(30, 400)[0])))
    ]
    options: dict[str, Any] = {"size": 100, "unsafe_columns": ["p"]}
    rows = kept(run(tmp_path, values, unsafe_share=0.25, **options))
    assert Counter(row["unsafe"] is True for row in rows) == {True: 25, False: 75}
    assert not any(row["unsafe"] for row in kept(run(tmp_path, values, unsafe_share=0, **options)))
    assert {row["unsafe"] for row in rows} == {True, False, None}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 41}, r"queries.size: 41 queries are asked for, but only 40 of 42 rows are left after the "
                       r"rules \(1 duplicate, 1 empty\); lower size, or give more queries"),
        ({"size": 20, "unsafe_columns": ["p"], "unsafe_share": 0.3},
         r"queries.unsafe_share: 0.3 of 20 queries takes 6 that are labelled unsafe .* only 4 of the 40"),
        ({"size": 39, "unsafe_columns": ["p"], "unsafe_share": 0.02},
         r"takes 38 that are not labelled unsafe .* but only 36 of the 40"),
    ],
)  # fmt: skip
def test_what_the_data_cannot_give(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    values = [{"query": f"query number {number}", "p": number % 10 == 0} for number in range(40)]
    with pytest.raises(InputError, match=says):
        run(tmp_path, [*values, values[0], ""], **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 5, "limit": 5}, "give one of them"),
        ({"unsafe_share": 0.1, "size": 5}, "unsafe_share needs size, and unsafe_columns"),
        (
            {"unsafe_share": 0.1, "unsafe_columns": ["p"]},
            "unsafe_share needs size, and unsafe_columns",
        ),
        ({"min_chars": 9, "max_chars": 8}, "min_chars 9 is over max_chars 8"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Queries(path="q.txt", **options)


def test_words_of_scripts_without_spaces() -> None:
    assert words_of("A Cat, 熊猫 in 4K") == ["a", "cat", "熊", "猫", "in", "4k"]
    assert list(itertools.chain(words_of("!"))) == []
