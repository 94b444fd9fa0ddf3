"""Exact and near duplicates: MinHash by datasketch, locality-sensitive hashing by sorting.

Signatures are made batch by batch, by any number of workers. The rest is arrays in one process: in
each band rows with equal keys are candidates, and a candidate pair counts when the share of equal
min-hashes reaches the threshold. All of it depends on content alone: what comes first is what has
the smaller id, not what was read first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from vpo_ray.recipe import NearDuplicates
from vpo_ray.stages.curate.rules import comparable

# A band finds a pair at the threshold with little luck; all bands together miss at most 1 of 100.
_RECALL = 0.99
# In a bucket of rows that are no near duplicates (a common opening is enough) each is compared with
# so many others, not with all.
_LEADERS = 32
_PAIRS_AT_ONCE = 1 << 18


def bands(settings: NearDuplicates) -> tuple[int, int]:
    """Bands, and rows in each: as many rows as still find a pair at the threshold."""
    for rows in range(settings.permutations, 1, -1):
        count = settings.permutations // rows
        if 1 - (1 - settings.threshold**rows) ** count >= _RECALL:
            return count, rows
    return settings.permutations, 1


def signatures(
    texts: Sequence[str], settings: NearDuplicates, images: Sequence[str | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the bands, uint64 (n, bands), and the low byte of every min-hash, uint8 (n, permutations).

    Texts with different images have nothing in common, however alike they are.

    Two min-hashes that differ share their low byte 1 time in 256, which the comparison corrects.
    """
    given = [None] * len(texts) if images is None else images
    from datasketch import MinHash  # here, as it imports scipy: half a second that a plan need not wait

    made = MinHash.generator(
        (_ngrams(text, settings.ngram, image or "") for text, image in zip(texts, given, strict=True)),
        num_perm=settings.permutations,
        seed=1,
        hashfunc=zlib.crc32,
        scheme="affine32",
    )
    hashes = np.array([minhash.hashvalues for minhash in made], np.uint32).reshape(-1, settings.permutations)
    count, rows = bands(settings)
    keys = np.full((len(hashes), count), 0xCBF29CE484222325, np.uint64)
    parts = hashes[:, : count * rows].reshape(-1, count, rows).astype(np.uint64)
    for row in range(rows):
        keys = (keys ^ parts[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys, (hashes & 0xFF).astype(np.uint8)


def _ngrams(text: str, size: int, image: str) -> set[bytes]:
    folded = comparable(text) or text
    return {(image + folded[at : at + size]).encode() for at in range(max(1, len(folded) - size + 1))}


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """True for every row whose key, uint64 (n, 2), no earlier row has."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of rows
    ordered = keys[order]
    first = np.ones(len(keys), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def near_duplicates(keys: np.ndarray, hashes: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are near duplicates of an earlier one that is kept, and the group of each.

    Args:
        keys: uint64 (n, bands), rows in the order of preference.
        hashes: uint8 (n, permutations).
        threshold: the Jaccard similarity from which on two rows are near duplicates.

    Returns:
        bool (n,): a duplicate; int64 (n,): the first row of its group, where all near duplicates of
        near duplicates are in one group.
    """
    count = len(keys)
    group = np.arange(count)
    if not count:
        return np.zeros(0, bool), group
    edges = np.concatenate(
        [np.empty(0, np.int64)]
        + [_similar_pairs(keys[:, band], hashes, threshold) for band in range(keys.shape[1])]
    )
    edges = np.unique(edges)  # by the later row, then by the earlier
    later, earlier = np.divmod(edges, count)
    dropped = bytearray(count)
    for start in range(0, len(edges), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        for row, other in zip(later[part].tolist(), earlier[part].tolist(), strict=True):
            if not dropped[other]:
                dropped[row] = 1
    duplicate = np.frombuffer(dropped, bool).copy()
    while len(edges):
        lowest = np.minimum(group[later], group[earlier])
        before = group.copy()
        np.minimum.at(group, later, lowest)
        np.minimum.at(group, earlier, lowest)
        group = group[group]
        if (group == before).all():
            break
    return duplicate, group


def _similar_pairs(keys: np.ndarray, hashes: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of one band as `later * n + earlier`: every row of a bucket against the one before it and
    against the first, those that are not like the first against the first of what is left, and so on."""
    rows = np.argsort(keys, kind="stable")
    found = [np.empty(0, np.int64)]
    for turn in range(_LEADERS):
        ordered = keys[rows]
        first = np.ones(len(rows), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        alone = first & np.append(first[1:], True)
        rows, first = rows[~alone], first[~alone]
        if not len(rows):
            break
        others = np.flatnonzero(~first)
        later, leader = rows[others], rows[first][np.cumsum(first)[others] - 1]
        alike = _alike(hashes, later, leader, threshold)
        found.append(later[alike] * len(keys) + leader[alike])
        if not turn:
            before = rows[others - 1]
            near = _alike(hashes, later, before, threshold)
            found.append(later[near] * len(keys) + before[near])
        rows = later[~alike]
    return np.concatenate(found)


def _alike(hashes: np.ndarray, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    # Of hashes that differ, 1 in 256 low bytes agree.
    needed = math.ceil((threshold + (1 - threshold) / 256) * hashes.shape[1] - 1e-9)
    alike = np.zeros(len(a), bool)
    for at in range(0, len(a), _PAIRS_AT_ONCE):
        part = slice(at, at + _PAIRS_AT_ONCE)
        alike[part] = (hashes[a[part]] == hashes[b[part]]).sum(axis=1) >= needed
    return alike
