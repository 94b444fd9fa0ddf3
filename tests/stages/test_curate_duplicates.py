"""Near duplicates: one of each is kept, by content; a group shares a split."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpo_ray.recipe import NearDuplicates, Queries
from vpo_ray.records import query_id
from vpo_ray.stages.curate import Curated, curate
from vpo_ray.stages.curate.duplicates import bands, first_of_equal, near_duplicates, signatures

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "rt", "lk", "sh")]


def sentences(count: int, seed: int = 0, words: int = 14) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def run(tmp_path: Path, values: list[str], **options: Any) -> Curated:
    path = tmp_path / "queries.json"
    path.write_text(json.dumps(values), "utf-8")
    return curate(Queries(path=str(path), **options))


def kept(curated: Curated) -> dict[str, str]:
    """Split by query."""
    return {row["query"]: row["split"] for part in curated.queries(1000) for row in part.to_pylist()}


def jaccard(a: str, b: str, size: int = 5) -> float:
    first, second = ({text[at : at + size] for at in range(len(text) - size + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(
    "other",
    [
        "A CAT SITS ON THE ROOF OF A RED HOUSE",
        "a cat sits on the roof of a red house!!",
        "  a cat, sits on the roof; of a red house",
        "a cat sits on the roof of the red house",
        "ａ cat sits on the roof of a red house",
        "a cat sits on the\u200b roof of a red house",
    ],
)
def test_variants_of_a_query(tmp_path: Path, other: str) -> None:
    query = "a cat sits on the roof of a red house"
    values = [query, other, "a dog runs along the beach"]
    curated = run(tmp_path, values, near_duplicates={"threshold": 0.7})
    assert curated.counts() == {"dpo": 2, "near duplicate": 1}
    # By content, not by what comes first.
    first = min(query, other.strip(), key=query_id)
    assert first in kept(curated)
    assert kept(curated) == kept(run(tmp_path, values[::-1], near_duplicates={"threshold": 0.7}))


def test_short_queries_that_share_words_stay(tmp_path: Path) -> None:
    values = [
        "cat",
        "a cat",
        "cats",
        "dog",
        "a red cat",
        "a red dog",
        "一只熊猫",
        "一只猫",
        "🌋",
        "🌊",
        "!",
        "?",
    ]
    assert set(kept(run(tmp_path, values, near_duplicates={}))) == set(values)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_what_lsh_finds_is_what_comparing_all_pairs_finds(threshold: float) -> None:
    rng = random.Random(1)
    texts = sentences(150)
    for _ in range(250):
        words = [*rng.choice(texts).split(), rng.choice("xyz")]
        for _ in range(rng.randrange(5)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    texts = sorted(set(texts), key=query_id)
    settings = NearDuplicates(threshold=threshold, permutations=256)
    keys, hashes = signatures(texts, settings)
    duplicate, group = near_duplicates(keys, hashes, threshold)
    pairs = [(a, b, jaccard(texts[a], texts[b])) for b in range(len(texts)) for a in range(b)]
    # The estimate of 256 hashes is off by 0.03 at most times.
    clear = [(a, b) for a, b, similarity in pairs if similarity > threshold + min(0.08, (1 - threshold) / 2)]
    assert len(clear) > 20
    assert sum(group[a] == group[b] for a, b in clear) >= 0.97 * len(clear)
    assert sum(not duplicate[a] and not duplicate[b] for a, b in clear) <= 0.03 * len(clear)
    near = {b for a, b, similarity in pairs if similarity > threshold - 0.1}
    near |= {a for a, b, similarity in pairs if similarity > threshold - 0.1}
    assert set(np.flatnonzero(duplicate).tolist()) <= near
    assert (group <= np.arange(len(texts))).all()


def test_bands_find_a_pair_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95):
        settings = NearDuplicates(threshold=threshold)
        count, rows = bands(settings)
        assert count * rows <= settings.permutations
        assert 1 - (1 - threshold**rows) ** count >= 0.99


def test_signatures_do_not_hang_on_the_batch() -> None:
    texts, settings = sentences(40), NearDuplicates()
    keys, hashes = signatures(texts, settings)
    for part in (slice(0, 1), slice(7, 30)):
        some_keys, some_hashes = signatures(texts[part], settings)
        assert (some_keys == keys[part]).all()
        assert (some_hashes == hashes[part]).all()
    # The same on every machine and in every version: stored groups stay what they are.
    assert hashes[0, :8].tolist() == signatures([texts[0]], settings)[1][0, :8].tolist()


def test_a_chain_is_one_group_and_its_ends_are_kept() -> None:
    # 0 is like 1, 1 is like 2, 0 is not like 2.
    hashes = np.zeros((3, 100), np.uint8)
    hashes[1, :15] = 1
    hashes[2, :30] = 1
    keys = np.array([[1, 7], [1, 8], [2, 8]], np.uint64)
    duplicate, group = near_duplicates(keys, hashes, 0.8)
    assert duplicate.tolist() == [False, True, False]
    assert group.tolist() == [0, 0, 0]


def test_a_bucket_of_rows_that_are_not_alike() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (500, 128), np.uint8)
    duplicate, group = near_duplicates(np.ones((500, 3), np.uint64), hashes, 0.8)
    assert not duplicate.any()
    assert group.tolist() == list(range(500))


def test_no_rows() -> None:
    duplicate, group = near_duplicates(np.empty((0, 4), np.uint64), np.empty((0, 8), np.uint8), 0.8)
    assert len(duplicate) == len(group) == 0


def test_first_of_equal() -> None:
    keys = np.array([[1, 2], [2, 1], [1, 2], [1, 3], [2, 1]], np.uint64)
    assert first_of_equal(keys).tolist() == [True, True, False, True, False]
    assert first_of_equal(keys[:0]).tolist() == []


def test_near_duplicates_never_cross_splits(tmp_path: Path) -> None:
    rng = random.Random(2)
    values = []
    for text in sentences(120):
        values.append(text)
        values += [f"{text} {rng.choice(WORDS)}" for _ in range(3)]
    rng.shuffle(values)
    splits = {"sft": 1, "dpo": 1, "eval": 1}
    found = kept(run(tmp_path, values, near_duplicates={"threshold": 0.7, "drop": False}, splits=splits))
    assert len(found) == len(set(values))
    by_text: dict[str, set[str]] = {}
    for query, split in found.items():
        by_text.setdefault(" ".join(query.split()[:14]), set()).add(split)
    assert all(len(names) == 1 for names in by_text.values())
    assert set.union(*by_text.values()) == {"sft", "dpo", "eval"}
    # Without groups the same queries do cross.
    alone = kept(run(tmp_path, values, splits=splits))
    assert any(alone[query] != alone[" ".join(query.split()[:14])] for query in alone)


def test_a_split_does_not_change_when_queries_are_added(tmp_path: Path) -> None:
    values = sentences(200)
    options: dict[str, Any] = {"near_duplicates": {}, "splits": {"sft": 1, "dpo": 1}}
    few, many = kept(run(tmp_path, values[:100], **options)), kept(run(tmp_path, values[::-1], **options))
    assert all(many[query] == split for query, split in few.items())
