from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.sequence import Tokens, layout, positions, prefix


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(golden, clean_up_tokenization_spaces=False)


def test_vqa_has_no_frame_indices_and_its_own_text(golden: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # The reference's turn with history, as one question that spells the history out.
    expected = load_file(golden / "expected.safetensors")
    before = prefix(tokenizer, "vqa", 24, 6, 514)
    turns = "Is it blurry? Short answer: no\nQuestion: Is there a circle? Short answer: yes\n"
    row = layout(tokenizer, "vqa", before, [f"{turns}Question: Is it bright?"], 2048)
    assert row.tokens.ids == expected["extra/vqa_history/input_ids"].tolist()
    assert row.tokens.positions == expected["extra/vqa_history/position_ids"].tolist()


def test_patches_of_a_frame_share_a_position() -> None:
    frame = [True] * 6
    assert positions([False, *frame, False, *frame, False]) == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8]
    assert positions([False, *frame, *frame]) == [0, 1, *[2] * 10, 3]


def test_every_question_starts_after_the_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    before = prefix(tokenizer, "chat", 2, 6, 514)
    row = layout(tokenizer, "chat", before, ["Is it bright?", "Is it?"], 2048)
    first = before.positions[-1] + 1
    for number, text in enumerate(["Is it bright?", "Is it?"]):
        places = row.question(number)
        assert places[-1] == row.last[number]
        ids = tokenizer.encode(f"Question: {text} Answer:", add_special_tokens=False)
        assert [row.tokens.ids[i] for i in places] == ids
        assert [row.tokens.positions[i] for i in places] == list(range(first, first + len(ids)))
    # "Question: Is it" is there once.
    assert len(row.chains) == 3
    assert len(row.tokens.ids) < row.prefix + sum(len(row.question(i)) for i in range(2))


def test_a_question_beyond_the_positions_is_refused_with_the_numbers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    before = prefix(tokenizer, "chat", 7, 6, 514)
    with pytest.raises(
        RewardError, match=r"question 2 has \d+ tokens after 29 positions .* the model has 64"
    ):
        layout(tokenizer, "chat", before, ["Is it?", "Is it very bright? " * 20], 64)


class Words:
    """A tokenizer whose tokens are what the test gave, one a word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12))
def test_the_tree_holds_every_question_as_it_is_and_each_beginning_once(questions: list[list[int]]) -> None:
    before = Tokens([9, 9, 9], [0, 1, 2], [False, True, True])
    texts = [" ".join(map(str, question)) for question in questions]
    row = layout(Words(), "base", before, texts, 100)
    for number, question in enumerate(questions):
        places = row.question(number)
        assert [row.tokens.ids[i] for i in places] == question
        assert [row.tokens.positions[i] for i in places] == list(range(3, 3 + len(question)))
    beginnings = {tuple(question[: i + 1]) for question in questions for i in range(len(question))}
    assert len(row.tokens.ids) - row.prefix == len(beginnings)
    assert sum(chain.end - chain.start for chain in row.chains) == len(beginnings)
