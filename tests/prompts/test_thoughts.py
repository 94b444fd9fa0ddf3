"""Thoughts that stand in an answer's text are no part of it, whole or in pieces."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.prompts.thoughts import (
    Spoken,
    UnclosedThought,
    marks_among,
    opened_thought,
    without_thoughts,
)

quick = settings(deadline=None, max_examples=100)
ANSWER = "A ginger cat sleeps on a warm roof."

THINKING = [
    "<think>\nThe user wants a cat.\n</think>\n\n{}",
    "<think></think>{}",
    "<thinking>a cat</thinking> {}",
    "<THINK>a cat</THINK>\n{}",
    "<reasoning>a cat</reasoning>\n{}",
    "<seed:think>a cat</seed:think>{}",
    "[THINK]a [red] cat[/THINK]{}",
    "◁think▷a cat◁/think▷{}",
    "<|START_THINKING|>a cat<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<|begin_of_thought|>a cat<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|channel|>analysis<|message|>a cat<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "analysisWe need a cat.assistantfinal{}",
    "<|channel>thought\na cat<channel|>{}",
    "<think>a cat</think><answer>{}</answer>",
    "<thinking>a cat</thinking>\n<output>\n{}\n</output><|im_end|>",
    "Here is my thought process:\na cat\nHere is my response:\n{}",
    "The user wants a cat.\n</think>\n\n{}",
    "<think>one</think><think>two</think>{}",
    "<think>the user wrote <think> twice</think>{}",
    "<think>one <</think>{}",
]


@pytest.mark.parametrize("form", THINKING)
def test_an_answer_behind_thoughts(form: str) -> None:
    assert without_thoughts(form.format(ANSWER)).strip() == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        "",
        ANSWER,
        "  spaced \n",
        "a < b > c",
        "[a] cat",
        "an analysis of cats",
        "he thinks </ i >",
        "1 <2",
        "<b>",
    ],
)
def test_text_without_thoughts_stays_as_it_is(text: str) -> None:
    assert without_thoughts(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe user wants",
        "<think>a</think> A cat. <think> Or a dog",
        "[THINK]hm",
        "◁think▷hm",
        "<|channel|>analysis<|message|>We need",
        "analysisWe need a cat",
    ],
)
def test_a_thought_without_an_end_is_no_answer(text: str) -> None:
    with pytest.raises(UnclosedThought):
        without_thoughts(text)
    spoken = Spoken()
    assert spoken.feed(text).strip() in ("", "A cat.")
    with pytest.raises(UnclosedThought):
        spoken.end()


def in_pieces(pieces: list[str]) -> str:
    spoken = Spoken()
    return "".join([*map(spoken.feed, pieces), spoken.end()])


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("form", THINKING)
def test_thoughts_are_taken_out_of_pieces(form: str, size: int) -> None:
    text = form.format(ANSWER)
    said = in_pieces([text[i : i + size] for i in range(0, len(text), size)])
    # Only what stands before an end without a beginning may have been told by then.
    assert said.removeprefix("The user wants a cat.\n").strip() == ANSWER


@quick
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "cat ", "<", "[TH", "INK]", "thi", "nk>", "\n", "a>"]))
)
def test_no_mark_is_left(pieces: list[str]) -> None:
    with suppress(UnclosedThought):
        assert "<think>" not in without_thoughts("".join(pieces))


@quick
@given(st.lists(st.text(alphabet="ab <>[]/◁▷thinkTHINK", max_size=8)))
def test_text_in_pieces_is_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    with suppress(UnclosedThought):
        if without_thoughts(text) == text:
            assert in_pieces(pieces) == text


def test_a_template_that_opens_a_thought_is_seen_at_the_end_of_its_prompt() -> None:
    assert opened_thought("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert opened_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_thought("say <think> twice\nassistant:") == ""
    assert opened_thought("") == ""


def test_marks_that_are_special_tokens_are_known(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="<|end|>")
    made.add_tokens([AddedToken("[/THINK]", special=True), AddedToken("<think>", special=False)])
    marks, others = marks_among(made)
    assert {made.convert_ids_to_tokens(i) for i in marks} == {"[/THINK]"}
    assert {made.convert_ids_to_tokens(i) for i in others} == {"<|end|>"}
