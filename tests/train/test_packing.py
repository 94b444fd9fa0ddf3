import time
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.train.examples import Example
from vpo_ray.train.packing import batch, pack, spread
from vpo_ray.train.phase import total_steps


def example(name: str, prompt: list[int], *responses: list[int]) -> Example:
    return Example(name, np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses))


PAIR = example("a", [1, 2, 3, 4], [10, 11, 12], [20, 21])
OTHER = example("b", [1, 2, 5], [30], [40, 41])


def test_a_pack_holds_shared_prompts_once_and_restarts_positions():
    packed = pack([PAIR, OTHER])
    assert packed.ids[0].tolist() == [1, 2, 3, 4, 10, 11, 12, 20, 21, 5, 30, 40, 41]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 2, 3, 3, 4]
    assert packed.lengths == (3, 2, 1, 2)


def test_exactly_the_response_tokens_are_learnt_each_from_the_token_before_it():
    packed = pack([PAIR, OTHER])
    assert packed.targets.tolist() == [10, 11, 12, 20, 21, 30, 40, 41]
    predicting = packed.ids[0][packed.predict].tolist()
    assert predicting == [4, 10, 11, 4, 20, 5, 5, 40]


def test_the_runs_are_the_common_start_and_each_response_with_the_prompt_before_the_first():
    packed = pack([PAIR, OTHER])
    assert packed.runs == (2, 5, 2, 2, 2)
    assert packed.sees == (2, 7, 6, 4, 5)
    assert [[packed.ids[0, n] for n in seen] for seen in packed.seen.split(packed.sees)] == [
        [1, 2],
        [1, 2, 3, 4, 10, 11, 12],
        [1, 2, 3, 4, 20, 21],
        [1, 2, 5, 30],
        [1, 2, 5, 40, 41],
    ]
    assert packed.ends.tolist() == [[0, 2, 7, 9, 11, 13], [0, 2, 9, 15, 19, 24]]
    assert packed.ends.dtype == torch.int32


def test_one_example_alone_shares_its_whole_prompt_between_its_responses():
    packed = pack([PAIR])
    assert packed.runs == (4, 3, 2)
    assert packed.ids[0][packed.predict].tolist() == [4, 10, 11, 4, 20]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4),
    st.booleans(),
)
def test_every_token_reads_exactly_what_stands_before_it_in_its_own_example(
    texts: list[tuple[list[int], list[list[int]]]], share: bool
):
    """Also with prompts that are alike, or the start of another."""
    packed = pack([example(str(n), prompt, *responses) for n, (prompt, responses) in enumerate(texts)], share)
    ids, positions = packed.ids[0], packed.positions[0]
    reads: dict[int, list[int]] = {}
    starts, seen = packed.ends[0].tolist(), packed.seen.split(packed.sees)
    for run, start in enumerate(starts[:-1]):
        for n in range(packed.runs[run]):
            reads[start + n] = seen[run][: packed.sees[run] - packed.runs[run] + n + 1].tolist()
    assert list(reads) == list(range(len(ids)))
    for token, read in reads.items():
        assert read[-1] == token
        assert positions[read].tolist() == list(range(len(read)))
    responses = [(prompt, response) for prompt, several in texts for response in several]
    learnt = torch.split(packed.predict, packed.lengths)
    for (prompt, response), predict in zip(responses, learnt, strict=True):
        for n, token in enumerate(predict.tolist()):
            assert ids[reads[token]].tolist() == prompt + response[:n]


def test_an_epoch_takes_every_row_once_and_ends_with_a_smaller_batch():
    steps = total_steps(10, 4, 2)
    taken = [batch(step, 10, 4, seed=3) for step in range(steps)]
    assert [len(t) for t in taken] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*taken[:3])), list(chain(*taken[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert taken == [batch(step, 10, 4, seed=3) for step in range(steps)]
    assert first != list(chain(*(batch(step, 10, 4, seed=4) for step in range(3))))


@pytest.mark.parametrize(
    ("rows", "workers", "micro"), [(8, 1, 8), (8, 2, 4), (7, 2, 2), (1, 4, 2), (5, 3, 1)]
)
def test_a_batch_is_spread_whole_with_the_same_micro_steps_for_every_worker(
    rows: int, workers: int, micro: int
):
    sizes = [100 + 37 * (n % 5) for n in range(rows)]
    shares = spread(range(rows), sizes, workers, micro)
    assert len({len(share) for share in shares}) == 1
    assert sorted(chain(*chain(*shares))) == list(range(rows))
    assert max(len(p) for share in shares for p in share) <= micro


def test_the_load_of_workers_is_balanced_by_tokens():
    sizes = [800, 10, 10, 10, 400, 400, 10, 10]
    shares = spread(range(8), sizes, workers=2, micro_batch=4)
    loads = [sum(sizes[row] for row in chain(*share)) for share in shares]
    assert max(loads) - min(loads) <= 20


def test_a_token_budget_makes_more_and_smaller_packs():
    sizes = [900, 300, 300, 300, 100, 100, 100, 100]
    shares = spread(range(8), sizes, workers=2, micro_batch=8, tokens=500)
    packs = [pack for share in shares for pack in share]
    assert sorted(chain(*packs)) == list(range(8))
    assert len({len(share) for share in shares}) == 1
    # What is longer than the budget is alone, the rest fits.
    assert [0] in packs
    assert all(sum(sizes[row] for row in pack) <= 500 for pack in packs if pack != [0])
    assert len(packs) < 8


def by_trying_every_count(
    sizes: list[int], workers: int, micro: int, tokens: int | None
) -> list[list[list[int]]]:
    """What `spread` is to give, each row by a look at every pack."""
    longest_first = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    steps = -(-len(sizes) // (workers * micro))
    while True:
        packs: list[list[int]] = [[] for _ in range(workers * steps)]
        for row in longest_first:
            least = min((p for p in packs if len(p) < micro), key=lambda p: sum(sizes[r] for r in p))
            least.append(row)
        if all(not tokens or len(p) < 2 or sum(sizes[r] for r in p) <= tokens for p in packs):
            return [packs[worker::workers] for worker in range(workers)]
        steps += 1


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=24),
    st.integers(1, 4),
    st.integers(1, 6),
    st.none() | st.integers(1, 60),
)
def test_packs_are_those_of_filling_the_emptiest_first(
    sizes: list[int], workers: int, micro: int, tokens: int | None
):
    shares = spread(range(len(sizes)), sizes, workers, micro, tokens)
    packs = list(chain(*shares))
    assert sorted(chain(*packs)) == list(range(len(sizes)))
    assert len({len(share) for share in shares}) == 1
    assert all(len(p) <= micro for p in packs)
    assert all(not tokens or len(p) < 2 or sum(sizes[r] for r in p) <= tokens for p in packs)
    expected = by_trying_every_count(sizes, workers, micro, tokens)
    # Halving may miss the very least number of steps, where more packs are worse for once.
    if len(shares[0]) == len(expected[0]):
        assert shares == expected
    if tokens is None:
        assert shares == expected


@pytest.mark.parametrize("tokens", [None, 8192])
def test_its_time_grows_little_faster_than_the_number_of_rows(tokens: int | None):
    """100,000 rows took minutes when each looked at every pack."""
    sizes = np.random.default_rng(0).integers(100, 3000, 100_000).tolist()
    began = time.process_time()
    shares = spread(range(len(sizes)), sizes, workers=8, micro_batch=16, tokens=tokens)
    assert time.process_time() - began < 20
    assert sum(len(p) for share in shares for p in share) == len(sizes)
