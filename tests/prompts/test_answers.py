"""The JSON object that was asked for is found where a model put it, and no other one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.prompts.answers import find_object, in_words, schema_fault

SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}, "why": {"type": "string", "maxLength": 5}},
    "required": ["verdict", "why"],
    "additionalProperties": False,
}
GOOD = json.dumps({"verdict": "yes", "why": 'it is {so} </think> ["so"]'})
OTHER = json.dumps({"verdict": "no", "why": "an example"})


@pytest.mark.parametrize(
    "form",
    [
        "%s",
        " \n%s\n",
        "```json\n%s\n```",
        "```\n%s```",
        "Here is the JSON:\n%s",
        "%s I hope this helps!",
        'The set {a, b} and {"x": 1}, so: %s (see [1])',
        f"First I thought {OTHER}, but: %s",
        f"<think>As in {OTHER}?</think>\n%s",
        f"Maybe {OTHER}\n</think>```json\n%s\n```",
        f"<|channel|>analysis<|message|>{OTHER}<|end|><|start|>assistant<|channel|>final<|message|>%s",
        f"The schema is {json.dumps(SCHEMA)}\n%s",
        f"%s\nIt is of the schema {json.dumps(SCHEMA)}",
        "<answer>%s</answer>",
        "{{%s}",
        "[1, 2,] and %s",
    ],
)
def test_the_object_is_found(form: str) -> None:
    for why in ('it is {so} ["so"]', "the request says </think>", "the request says <think>[THINK]"):
        good = json.dumps({"verdict": "yes", "why": why})
        assert json.loads(find_object(form.replace("%s", good), SCHEMA)) == json.loads(good)


@pytest.mark.parametrize("form", ["%s", "```json\n%s\n```", '<think>{"a": [1,],}</think>\nSo: %s Bye,'])
def test_a_comma_behind_the_last_item_is_no_fault(form: str) -> None:
    """Else an answer is paid for twice, and its row is lost."""
    listed = {**SCHEMA, "properties": {**SCHEMA["properties"], "more": {"type": "array"}}}
    said = form.replace("%s", '{"verdict": "yes", "more": ["a,]", "b, }" ,\n ], "why": "so, }",\n}')
    expected = {"verdict": "yes", "more": ["a,]", "b, }"], "why": "so, }"}
    assert json.loads(find_object(said, listed)) == expected


def test_an_object_that_was_encoded_twice_is_found() -> None:
    assert find_object(json.dumps(GOOD), SCHEMA) == GOOD


def test_an_answer_that_is_the_object_is_left_as_it_is() -> None:
    assert find_object(GOOD, SCHEMA) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes",
        f"<think>As in {OTHER}?",
        f"<think>As in {OTHER}?</think>",
        f"<think>As in {OTHER}?</think> I cannot tell",
        f"[{OTHER}]",
        json.dumps({"answer": json.loads(OTHER), "more": 1}),
        f"It says {json.dumps(OTHER)}",
        json.dumps(json.dumps(OTHER)),
        f"Here: {json.dumps(SCHEMA)}",
        '{"verdict": "yes", "why"',
        '```json\n{"verdict": "maybe", "why": ""}\n```',
        "{" * 100_000,
        "[" * 100_000,
        '{"a":' * 20_000,
    ],
)
def test_nothing_else_is_taken_for_it(text: str) -> None:
    assert schema_fault(find_object(text, SCHEMA), SCHEMA) is not None


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet='{}[]"\\:, \ntruefalsnk<>/0'))
def test_any_text_around_the_object_is_no_error(text: str) -> None:
    assert isinstance(find_object(text, SCHEMA), str)
    assert schema_fault(find_object(f"{text}\n{OTHER}", SCHEMA), SCHEMA) is None or text


def test_half_a_character_is_a_fault() -> None:
    assert schema_fault('{"verdict": "yes", "why": "\\ud800"}', SCHEMA) is not None


def test_a_schema_in_words_is_said_behind_the_question() -> None:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "is it?"}]
    system, user = in_words(asked, SCHEMA)
    assert (system, asked[1]["content"]) == (asked[0], "is it?")
    assert user["content"].startswith("is it?\n\n")
    assert '"enum": ["yes", "no"]' in user["content"]
    assert "maxLength" not in user["content"]
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "is it?"}]
    [user] = in_words([{"role": "user", "content": parts}], SCHEMA)
    assert user["content"][:2] == parts
    assert '"yes"' in user["content"][2]["text"]
