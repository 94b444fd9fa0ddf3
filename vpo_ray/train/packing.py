"""Which examples make a step, how they spread over workers, and how some of them share one row.

A pack is one sequence without padding: [common start of the prompts][rest of prompt 1][its
responses][rest of prompt 2]... Positions restart so that every response stands where it would
stand alone, and the layout says which tokens see which. The task instruction is computed once per
pack, and a prompt once for both responses of a pair, with the same result as without sharing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vpo_ray.records import seed_of
from vpo_ray.train.examples import Example


@dataclass(frozen=True)
class Block:
    """Tokens `start:end` of a pack that see its prefix and, by `mask`, each other.

    mask: bool, [end - start, prefix + end - start], True where a token (row) sees a key (column).
    """

    start: int
    end: int
    mask: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """One sequence of examples. T tokens, of which N are learnt, in S responses.

    ids, positions: int64 [1, T].
    prefix: tokens at the start that every example shares.
    blocks: one per example, in order; prefix and blocks cover the pack.
    predict: int64 [N], the token whose hidden state predicts a learnt token.
    targets: int64 [N], the learnt tokens.
    lengths: learnt tokens of each of the S responses, in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    prefix: int
    blocks: tuple[Block, ...]
    predict: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Pack:
        blocks = tuple(Block(b.start, b.end, b.mask.to(device)) for b in self.blocks)
        moved = (t.to(device) for t in (self.ids, self.positions, self.predict, self.targets))
        ids, positions, predict, targets = moved
        return Pack(ids, positions, self.prefix, blocks, predict, targets, self.lengths)


def pack(examples: Sequence[Example], share: bool = True) -> Pack:
    """Pack examples; `share=False` gives every response its own copy of the prompt (no sharing at
    all, for comparison)."""
    if not share:
        examples = [Example(e.id, e.prompt, (r,)) for e in examples for r in e.responses]
    prefix = _common_prefix([e.prompt for e in examples]) if share else 0
    ids, positions = [examples[0].prompt[:prefix]], [np.arange(prefix)]
    predict, targets, lengths, blocks = [], [], [], []
    start = prefix
    for example in examples:
        query, at = example.prompt[prefix:], len(example.prompt)
        parts = [query, *example.responses]
        ids += parts
        positions += [np.arange(prefix, at), *(np.arange(at, at + len(r)) for r in example.responses)]
        # The prompt's last token predicts the first token of every response.
        last = start + len(query) - 1 if len(query) else prefix - 1
        first = start + len(query)
        for response in example.responses:
            predict.append(np.concatenate([[last], np.arange(first, first + len(response) - 1)]))
            targets.append(response)
            lengths.append(len(response))
            first += len(response)
        blocks.append(Block(start, first, _mask(prefix, [len(p) for p in parts])))
        start = first
    return Pack(
        _row(ids)[None],
        _row(positions)[None],
        prefix,
        tuple(blocks),
        _row(predict),
        _row(targets),
        tuple(lengths),
    )


def _common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all prompts start with alike."""
    shortest = min(map(len, prompts))
    differs = np.any([p[:shortest] != prompts[0][:shortest] for p in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _mask(prefix: int, parts: Sequence[int]) -> torch.Tensor:
    """Part 0 is the rest of the prompt; the others are responses, that do not see each other."""
    part = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    seen = (part[None] == 0) | (part[None] == part[:, None])
    causal = torch.ones(len(part), len(part), dtype=torch.bool).tril()
    return torch.cat([torch.ones(len(part), prefix, dtype=torch.bool), seen & causal], dim=1)


def total_steps(rows: int, global_batch: int, epochs: float) -> int:
    """Optimizer steps: whole epochs end with a smaller batch where it does not divide."""
    return max(1, math.ceil(epochs * math.ceil(rows / global_batch) - 1e-9))


def batch(step: int, rows: int, global_batch: int, seed: int) -> list[int]:
    """Rows of one optimizer step: every epoch is a seeded permutation, cut into global batches."""
    epoch, within = divmod(step, math.ceil(rows / global_batch))
    order = np.random.default_rng(seed_of("epoch", seed, epoch)).permutation(rows)
    return order[within * global_batch : (within + 1) * global_batch].tolist()


def spread(
    rows: Sequence[int], sizes: Sequence[int], workers: int, micro_batch: int, tokens: int | None = None
) -> list[list[list[int]]]:
    """Rows of a batch as [worker][micro step][row]: the same number of micro steps for all.

    Packs are filled longest row first into the pack with the fewest tokens, so that workers wait
    little for each other. Where rows do not fill every pack, some are empty.

    Args:
        rows: row numbers.
        sizes: tokens of each of them, with its own copy of the prompt.
        micro_batch: rows a pack takes at most.
        tokens: a pack's budget; a row that is longer gets a pack of its own.
    """
    micro_steps = math.ceil(len(rows) / (workers * micro_batch))
    longest_first = sorted(zip(sizes, rows, strict=True), key=lambda item: (-item[0], item[1]))
    while True:
        packs: list[list[int]] = [[] for _ in range(workers * micro_steps)]
        filled = [0] * len(packs)
        for size, row in longest_first:
            best = min((n for n, p in enumerate(packs) if len(p) < micro_batch), key=lambda n: (filled[n], n))
            packs[best].append(row)
            filled[best] += size
        over = [p for p, size in zip(packs, filled, strict=True) if tokens and size > tokens and len(p) > 1]
        if not over:
            return [packs[worker::workers] for worker in range(workers)]
        micro_steps += 1
