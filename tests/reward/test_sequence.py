from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from vpo_ray.engines.reward import RewardError
from vpo_ray.engines.reward.sequence import layout, positions, prefix


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
    starts = [row.tokens.positions[start] for start, _ in row.questions]
    assert starts == [before.positions[-1] + 1] * 2
    assert row.last == [end - 1 for _, end in row.questions]


def test_a_question_beyond_the_positions_is_refused_with_the_numbers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    before = prefix(tokenizer, "chat", 7, 6, 514)
    with pytest.raises(
        RewardError, match=r"question 2 has \d+ tokens after 29 positions .* the model has 64"
    ):
        layout(tokenizer, "chat", before, ["Is it?", "Is it very bright? " * 20], 64)
