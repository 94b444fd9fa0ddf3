"""A diverse subset of a wanted size, in two ways.

Farthest-first traversal takes the query that is farthest from all taken before it: the greedy
2-approximation of the k-center problem (Gonzalez 1985), here in a space of hashed words and word
pairs, weighted by how rare they are. One step looks at one cell of a k-means partition only, and the
cell with the widest gap is next, so that the work grows with the number of queries and not with its
square. Self-BLEU (Zhu et al. 2018, Texygen) is VPO's own filter (paper 3.2), exact and for up to
MAX_SELF_BLEU queries.

All vectors hold small integers, whose products are exact in float32: no choice hangs on the order
in which a machine adds.
"""

from __future__ import annotations

import heapq
import itertools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from vpo_ray.stages.curate.rules import comparable

DIMENSIONS = 128
BUCKETS = 1 << 18  # of hashed terms
MAX_SELF_BLEU = 100_000
_CELL = 1024  # queries, where the subset is large enough for many cells
_MAX_CELLS = 1024
_PER_CELL = 8  # chosen of each cell at least, on average
_ROUNDS, _SAMPLE = 6, 64  # k-means: rounds, and sampled rows a cell
_CHUNK = 4096
# BLEU's smoothing for a length with no match (method 1 of Chen and Cherry 2014), as Texygen has it.
_SMOOTHING = 0.1


def terms(text: str) -> np.ndarray:
    """The hashed words and word pairs of a text, each once: uint32, sorted."""
    words = words_of(text)
    found = {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))} or {text}
    return np.unique(np.array([zlib.crc32(term.encode()) % BUCKETS for term in found], np.uint32))


def words_of(text: str) -> list[str]:
    """Folded words; a word with characters of East Asia is taken character by character."""
    return [
        part
        for word in comparable(text).split()
        for part in ([word] if word.isascii() or max(word) < "\u2e80" else word)
    ]


def embed(offsets: np.ndarray, hashed: np.ndarray) -> np.ndarray:
    """Vectors of length 127 of rows of terms: int8 (n, DIMENSIONS), zeros where no term carries information.

    Args:
        offsets: int64 (n + 1,), where each row's terms start in `hashed`.
        hashed: uint32, terms of all rows one after another.
    """
    count = len(offsets) - 1
    frequency = np.bincount(hashed, minlength=BUCKETS)
    # The whole part of log2(n / frequency): a term in half of all queries or more counts for nothing.
    weights = (np.frexp(count / np.maximum(frequency, 1))[1] - 1).astype(np.int8)
    bits = np.random.PCG64(0).random_raw(BUCKETS * DIMENSIONS // 64).view(np.uint8)
    signs = np.unpackbits(bits).reshape(BUCKETS, DIMENSIONS).astype(np.int8) * 2 - 1
    vectors = np.zeros((count, DIMENSIONS), np.int8)
    for start in range(0, count, _CHUNK):
        starts, ends = offsets[:-1][start : start + _CHUNK], offsets[1:][start : start + _CHUNK]
        # The longest first, so that rows that still have a term are in front.
        order = np.argsort(starts - ends, kind="stable")
        starts, lengths = starts[order], (ends - starts)[order]
        sums = np.zeros((len(order), DIMENSIONS), np.int32)
        for number in range(lengths[0]):
            rows = np.searchsorted(-lengths, -number)
            term = hashed[starts[:rows] + number]
            sums[:rows] += signs[term] * weights[term, None]
        length = np.sqrt((sums.astype(np.int64) ** 2).sum(axis=1, keepdims=True))
        vectors[start + order] = np.rint(127 * sums / np.maximum(length, 1))
    return vectors


def farthest_first(vectors: np.ndarray, size: int) -> np.ndarray:
    """`size` rows, spread out: int64, in the order of choice.

    Args:
        vectors: int8 (n, DIMENSIONS), rows in the order of preference among equals.
    """
    if size >= len(vectors):
        return np.arange(len(vectors))
    cells = [_Cell(vectors, rows) for rows in _cells(vectors, size)]
    chosen: list[int] = []
    # The widest gap is next; of equal ones, that of the larger cell.
    queue = [(-cell.gap, -len(cell.rows), number) for number, cell in enumerate(cells)]
    heapq.heapify(queue)
    while len(chosen) < size:
        _, length, number = heapq.heappop(queue)
        chosen.append(cells[number].choose())
        if len(cells[number].rows) > cells[number].chosen:
            heapq.heappush(queue, (-cells[number].gap, length, number))
    return np.array(chosen)


class _Cell:
    """Rows that lie together, and how far each is from the nearest chosen one."""

    def __init__(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        self.rows, self.chosen = rows, 0
        self.vectors = vectors[rows].astype(np.float32)
        self.squares = (self.vectors**2).sum(axis=1)
        # The first is the one nearest to the middle.
        self.distance = self.vectors @ np.rint(self.vectors.mean(axis=0, dtype=np.float64)).astype(np.float32)
        self.gap = math.inf

    def choose(self) -> int:
        at = int(self.distance.argmax())
        if not self.chosen:
            self.distance[:] = math.inf
        toward = self.vectors @ self.vectors[at]
        np.minimum(self.distance, self.squares + self.squares[at] - 2 * toward, out=self.distance)
        self.distance[at] = -1
        self.chosen += 1
        self.gap = float(self.distance.max())
        return int(self.rows[at])


def _cells(vectors: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows of each cell of a k-means partition (of the sphere), none much larger than the others."""
    count = len(vectors)
    number = min(count // _CELL, size // _PER_CELL, _MAX_CELLS)
    if number <= 1:
        return [np.arange(count)]
    centres = vectors[:: count // number][:number].astype(np.float32)
    sample = vectors[:: max(1, count // (number * _SAMPLE))]
    for _ in range(_ROUNDS):
        nearest = _nearest(sample, centres)
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        sums = np.add.reduceat(sample[order].astype(np.int64), starts, axis=0)
        length = np.sqrt((sums**2).sum(axis=1, keepdims=True))
        centres[present] = np.rint(127 * sums / np.maximum(length, 1))
    nearest = _nearest(vectors, centres)
    order = np.argsort(nearest, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1)
    largest = max(4 * _CELL, 2 * count // number)
    return [part for cell in rows for part in np.array_split(cell, -(-len(cell) // largest))]


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    parts = [
        (vectors[at : at + _CHUNK].astype(np.float32) @ centres.T).argmax(axis=1)
        for at in range(0, len(vectors), _CHUNK)
    ]
    return np.concatenate(parts)


def least_self_bleu(texts: Sequence[str], size: int, order: int) -> np.ndarray:
    """`size` rows that are left when the most alike is taken out again and again: int64, ascending.

    The self-BLEU of a text is its BLEU with all others as references, over words, of lengths 1 to
    `order` (to its own length, if that is less), without brevity penalty: among so many references one
    has nearly its length. Of equal ones the last row goes first.
    """
    pool = BleuPool(texts, order)
    queue = [(-pool.score(row), -row) for row in range(len(texts))]
    heapq.heapify(queue)
    while len(queue) > size:
        stored, row = queue[0]
        # A score can only fall when others leave, so a stored one is no less than the true one.
        now = (-pool.score(-row), row)
        if now > (stored, row):
            heapq.heapreplace(queue, now)
        else:
            heapq.heappop(queue)
            pool.remove(-row)
    return np.array(sorted(-row for _, row in queue), np.int64)


class BleuPool:
    """Texts, each with all others as BLEU's references.

    The n-th occurrence of an n-gram in a text is a token of its own. BLEU's clipped count is then the
    number of tokens that another text has too, and for all of them one array of frequencies is enough.
    """

    def __init__(self, texts: Sequence[str], order: int) -> None:
        self.order = order
        tokens, self.bounds = _tokens([words_of(text) for text in texts], order)
        _, self.tokens = np.unique(tokens, return_inverse=True)
        self.frequency = np.bincount(self.tokens)

    def _of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        bounds = self.bounds[row * self.order : (row + 1) * self.order + 1]
        return self.tokens[bounds[0] : bounds[-1]], bounds - bounds[0]

    def score(self, row: int) -> float:
        """The self-BLEU of a text that is still there, in [0, 1]; 0 of one without words."""
        tokens, bounds = self._of(row)
        if not len(tokens):
            return 0.0
        shared = (self.frequency[tokens] > 1).cumsum()
        ends = [end for start, end in itertools.pairwise(bounds.tolist()) if end > start]
        total, before, counted = 0.0, 0, 0
        for end in ends:
            here = int(shared[end - 1])
            total += math.log((here - counted or _SMOOTHING) / (end - before))
            before, counted = end, here
        return math.exp(total / len(ends))

    def remove(self, row: int) -> None:
        self.frequency[self._of(row)[0]] -= 1


def _tokens(texts: Sequence[Sequence[str]], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all tokens by text and length, uint64, and where each text's tokens of each length
    start, int64 (texts * order + 1,)."""
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(w, len(known)) for words in texts for w in words], np.uint64)
    rows = np.repeat(np.arange(len(texts)), [len(words) for words in texts])
    groups, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    hashed = np.zeros(len(ids), np.uint64)
    for length in range(1, order + 1):
        # Of the n-gram that starts at each word; those that would leave the text are left out.
        last = len(ids) - length + 1
        if last <= 0:
            break
        hashed = _mix(hashed[:last], ids[length - 1 :])
        inside = rows[:last] == rows[length - 1 :]
        groups.append(rows[:last][inside] * order + length - 1)
        hashes.append(_mix(hashed[inside], np.uint64(length)))
    group, found = np.concatenate(groups), np.concatenate(hashes)
    sort = np.lexsort((found, group))
    group, found = group[sort], found[sort]
    first = np.append(True, (group[1:] != group[:-1]) | (found[1:] != found[:-1]))[: len(found)]
    position = np.arange(len(found))
    occurrence = position - np.maximum.accumulate(np.where(first, position, 0))
    return _mix(found, occurrence.astype(np.uint64)), np.searchsorted(
        group, np.arange(len(texts) * order + 1)
    )


def _mix(hashed: np.ndarray, value: np.ndarray | np.uint64) -> np.ndarray:
    """Hashes with one more value in them (the finaliser of splitmix64)."""
    mixed = hashed * np.uint64(0x9E3779B97F4A7C15) + value + np.uint64(1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
