"""Which examples make a step, how they spread over workers, and how some of them share one row.

A pack is one sequence without padding: [common start of the prompts][rest of prompt 1][its
responses][rest of prompt 2]... Positions restart so that every response has the positions that it would
have alone, and the layout says which tokens see which. The task instruction is computed once per pack, and
a prompt once for both responses of a pair, with the same result as without sharing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heapreplace

import numpy as np
import torch

from vpo_ray.records import seed_of
from vpo_ray.train.examples import Example


@dataclass(frozen=True)
class Pack:
    """One sequence of examples. T tokens, of which N are learnt, in S responses.

    Attention reads it as runs of tokens: the common start, then for each example the rest of its
    prompt with its first response, and each further response. A token of a run sees the tokens
    given for the run, except later ones of the run itself: the causal mask of queries that are the last
    of their keys.

    ids, positions: int64 [1, T].
    runs: tokens of each run, in order; their sum is T.
    sees: tokens that each run sees, its own included.
    seen: indices of these tokens, run by run, by position, the run's own last; int64 [sum of sees].
    ends: offsets of the runs, and of what they see; int32 [2, runs + 1].
    predict: int64 [N], the token whose hidden state predicts a learnt token.
    targets: int64 [N], the learnt tokens.
    lengths: learnt tokens of each of the S responses, in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    runs: tuple[int, ...]
    sees: tuple[int, ...]
    seen: torch.Tensor
    ends: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Pack:
        return Pack(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in vars(self).values()))


def pack(examples: Sequence[Example], share: bool = True) -> Pack:
    """Pack examples; `share=False` gives every response its own copy of the prompt, for comparison."""
    if not share:
        examples = [Example(e.id, e.prompt, (r,)) for e in examples for r in e.responses]
    prefix = _common_prefix([e.prompt for e in examples]) if share else 0
    shared = np.arange(prefix)
    ids, positions = [examples[0].prompt[:prefix]], [shared]
    predict, targets, lengths = [], [], []
    runs, seen = ([prefix], [shared]) if prefix else ([], [])
    end = prefix
    for example in examples:
        at = len(example.prompt)
        query = np.arange(end, end + at - prefix)
        ids.append(example.prompt[prefix:])
        positions.append(np.arange(prefix, at))
        end += len(query)
        # The prompt's last token predicts the first token of every response.
        last = end - 1 if len(query) else prefix - 1
        for n, response in enumerate(example.responses):
            own = np.arange(end, end + len(response))
            ids.append(response)
            positions.append(np.arange(at, at + len(own)))
            runs.append(len(own) if n else len(query) + len(own))
            seen.append(np.concatenate([shared, query, own]))
            predict.append(np.concatenate([[last], own[:-1]]))
            targets.append(response)
            lengths.append(len(own))
            end += len(own)
    sees = [len(s) for s in seen]
    ends = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in (runs, sees)]
    return Pack(
        _row(ids)[None],
        _row(positions)[None],
        tuple(runs),
        tuple(sees),
        _row(seen),
        torch.from_numpy(np.stack(ends).astype(np.int32)),
        _row(predict),
        _row(targets),
        tuple(lengths),
    )


def _common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """The number of tokens that all prompts have in common at the start."""
    shortest = min(map(len, prompts))
    differs = np.any([p[:shortest] != prompts[0][:shortest] for p in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def batch(step: int, rows: int, global_batch: int, seed: int) -> list[int]:
    """Rows of one optimizer step: every epoch is a seeded permutation, cut into global batches."""
    epoch, within = divmod(step, math.ceil(rows / global_batch))
    return _order(rows, seed, epoch)[within * global_batch : (within + 1) * global_batch].tolist()


@lru_cache(maxsize=1)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_of("epoch", seed, epoch)).permutation(rows)


def spread(
    rows: Sequence[int], sizes: Sequence[int], workers: int, micro_batch: int, tokens: int | None = None
) -> list[list[list[int]]]:
    """Rows of a batch as [worker][micro step][row]: the same number of micro steps for all.

    Rows go, longest first, into the pack with the fewest tokens, so that workers wait little for each
    other. Where there are fewer rows than packs, some packs are empty. The number of micro steps is the
    smallest that this method allows, found by doubling and bisection; from 1,024 on to within a
    thousandth. Takes O(n log n) time for n rows.

    Args:
        rows: row numbers.
        sizes: tokens of each of them, with its own copy of the prompt.
        micro_batch: most rows of a pack.
        tokens: most tokens of a pack; a longer row gets a pack of its own.
    """
    longest_first = sorted(zip(sizes, rows, strict=True), key=lambda item: (-item[0], item[1]))
    least = math.ceil(len(rows) / (workers * micro_batch))
    if tokens:
        least = max(least, math.ceil(_fewest_packs([size for size, _ in longest_first], tokens) / workers))

    def filled(micro_steps: int) -> list[list[int]] | None:
        return _fill(longest_first, workers * micro_steps, micro_batch, tokens)

    near = step = max(1, least // 1024)
    short, enough, packs = least - 1, least, filled(least)
    while packs is None:
        short, enough, step = enough, enough + step, 2 * step
        packs = filled(enough)
    while enough - short > near:
        middle = (short + enough) // 2
        found = filled(middle)
        if found is None:
            short = middle
        else:
            enough, packs = middle, found
    return [packs[worker::workers] for worker in range(workers)]


def _fewest_packs(sizes: Sequence[int], tokens: int) -> int:
    """A lower bound of the packs for rows of these sizes, longest first: by all their tokens, and because no
    pack has k + 1 rows that are longer than 1 / (k + 1) of the budget."""
    bounds = [math.ceil(sum(min(size, tokens) for size in sizes) / tokens)]
    for k in range(1, 33):
        longer = bisect_left(sizes, -tokens / (k + 1), key=lambda size: -size)
        bounds.append(math.ceil(longer / k))
    return max(bounds)


def _fill(
    longest_first: Sequence[tuple[int, int]], count: int, micro_batch: int, tokens: int | None
) -> list[list[int]] | None:
    """(size, row) pairs in `count` packs, each row in the emptiest pack with room for a row (the first of
    equals); None where a pack of several rows would exceed its tokens."""
    packs: list[list[int]] = [[] for _ in range(count)]
    # A pack is one number, its tokens * count + its index: a heap compares numbers faster than pairs.
    heap = list(range(count))
    for size, row in longest_first:
        held, place = divmod(heap[0], count)
        pack = packs[place]
        if tokens and pack and held + size > tokens:
            return None
        pack.append(row)
        if len(pack) < micro_batch:
            heapreplace(heap, heap[0] + size * count)
        else:
            heappop(heap)
    return packs
