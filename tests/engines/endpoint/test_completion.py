"""Answers of every shape: read as far as they can be, never an error of reading, tokens in any case."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.engines.chat import Usage
from vpo_ray.engines.endpoint.completion import Completion, parse_body, read_completion

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
quick = settings(deadline=None, max_examples=100)


def body(content: Any = "a cat", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"id": "1", "choices": [{**choice, **more}], "usage": USAGE}


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    "content",
    [
        "a cat",
        ["a ", "cat"],
        [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}],
        [THOUGHT, {"type": "text", "text": "a cat"}],
        [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "a cat"}],
        [{"text": "hm", "thought": True}, {"text": "a cat"}],
        [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a cat", "citations": None}],
        [{"type": "text", "text": "a cat"}, {"type": "reference", "reference_ids": [1]}, None, 5],
        [{"type": "text", "text": {"value": "a cat", "annotations": []}}],
        {"type": "text", "text": "a cat"},
        {"parts": [{"text": "a cat"}]},
    ],
)
def test_content_in_parts_is_its_text_without_thoughts(content: Any) -> None:
    assert read_completion(body(content)).text == "a cat"


@pytest.mark.parametrize(
    "whole",
    [
        {"type": "message", "content": [THOUGHT, {"type": "text", "text": "a cat"}],
         "stop_reason": "end_turn", "usage": {"input_tokens": 10, "output_tokens": 5}},
        {"candidates": [{"content": {"parts": [{"text": "hm", "thought": True}, {"text": "a cat"}]},
                         "finishReason": "STOP"}],
         "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2, "thoughtsTokenCount": 3,
                           "totalTokenCount": 15}},
        {"output": [{"type": "reasoning", "summary": []},
                    {"type": "message", "content": [{"type": "output_text", "text": "a cat"}]}],
         "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}},
        {"message": {"role": "assistant", "content": "a cat"}, "done_reason": "stop",
         "prompt_eval_count": 10, "eval_count": 5},
        {"choices": [{"text": "a cat", "finish_reason": "stop"}], "usage": USAGE},
        {"choices": [{"message": "a cat"}], "usage": USAGE},
        {"choices": {"message": {"content": "a cat"}}, "usage": USAGE},
        {"choices": [{"delta": {"content": "a cat"}, "usage": USAGE}]},
    ],
)  # fmt: skip
def test_other_shapes_of_an_answer(whole: dict[str, Any]) -> None:
    found = read_completion(whole)
    assert (found.text, found.usage, found.answered) == ("a cat", Usage(10, 5), True)


def test_an_object_that_a_server_parsed_is_the_answer() -> None:
    assert json.loads(read_completion(body({"verdict": "yes"})).text) == {"verdict": "yes"}


def test_events_of_a_stream_are_an_answer() -> None:
    parts = ({"choices": [{"delta": {"content": text}}]} for text in ("a ", "cat"))
    chunks = [*parts, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]
    text = ": hello\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    found = read_completion(parse_body(text.encode()))
    assert (found.text, found.finish, found.usage) == ("a cat", "stop", Usage(10, 5))


def test_signs_of_life_in_front_of_an_answer_are_no_part_of_it() -> None:
    text = ": PROCESSING\n\n: PROCESSING\n\n" + json.dumps(body("a cat"))
    assert read_completion(parse_body(text.encode())).text == "a cat"


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (USAGE, (10, 5)),
        ({"prompt_tokens": 10.0, "completion_tokens": 5.0}, (10, 5)),
        ({"prompt_tokens": "10", "completion_tokens": "5"}, (10, 5)),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 15}, (10, 5)),
        ({"completion_tokens": 5, "total_tokens": 15}, (10, 5)),
        ({"input_tokens": 2, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 1,
          "output_tokens": 5}, (10, 5)),
        ({**USAGE, "cache_read_input_tokens": 7}, (10, 5)),
        ({"prompt_tokens": 10}, (10, 0)),
        ({"total_tokens": 15}, (15, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 15}, (10, 5)),
        ({"prompt_tokens": -1, "completion_tokens": 5}, (0, 5)),
        ({"prompt_tokens": float("nan"), "completion_tokens": 5}, (0, 5)),
        ({"prompt_tokens": float("inf"), "completion_tokens": 5}, (0, 5)),
        ({"prompt_tokens": 10**400, "completion_tokens": 5}, (0, 5)),
        ({"prompt_tokens": True, "completion_tokens": [1]}, (0, 0)),
        ([USAGE], (10, 5)),
        (None, (0, 0)),
        ("15", (0, 0)),
    ],
)  # fmt: skip
def test_tokens_are_counted_however_they_are_told(usage: Any, counted: tuple[int, int]) -> None:
    found = read_completion(parse_body(json.dumps({**body(), "usage": usage}).encode()))
    assert (found.usage.prompt, found.usage.completion, found.text) == (*counted, "a cat")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"message": {"content": None, "refusal": "I cannot"}}, "the model refused: I cannot"),
        (
            {"message": {"content": [{"type": "refusal", "refusal": "I cannot"}]}},
            "the model refused: I cannot",
        ),
        ({"message": {"content": None, "refusal": True}}, "the model refused"),
        ({"finish_reason": "SAFETY", "message": None}, "a content filter stopped"),
        ({"finish_reason": "content_filter"}, "a content filter stopped"),
    ],
)
def test_refusals_of_every_shape(more: dict[str, Any], says: str) -> None:
    assert (read_completion(body(**more)).refusal or "").startswith(says)


@pytest.mark.parametrize(
    "whole",
    [
        {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
        {"choices": [], "prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": True}}}]},
    ],
)
def test_a_question_that_was_filtered(whole: dict[str, Any]) -> None:
    assert (read_completion(whole).refusal or "").startswith("a content filter refused the question")


def test_fields_that_are_not_needed_may_be_anything() -> None:
    odd = {"refusal": False, "finish_reason": 1, "logprobs": [None], "index": "x"}
    found = read_completion(body("a cat", **odd) | {"id": 7, "created": None, "service_tier": {"a": []}})
    assert (found.text, found.finish, found.refusal, found.tokens()) == ("a cat", "1", None, [])


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": [{"token": "no", "logprob": -1}]}]},
        {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": {"no": -1}}, None, {"token": 5}]},
        {"tokens": ["yes"], "token_logprobs": [-0.5], "top_logprobs": [{"no": -1, "maybe": None}]},
        [
            {
                "token": "yes",
                "logprob": -0.5,
                "top_logprobs": [{"token": "no", "logprob": -1}, {"token": None}],
            }
        ],
    ],
)
def test_log_probabilities_of_other_shapes(logprobs: Any) -> None:
    [token] = read_completion(body(logprobs=logprobs)).tokens()
    assert (token.token, dict(token.alternatives)) == ("yes", {"yes": -0.5, "no": -1.0})


@pytest.mark.parametrize("top", [None, 5, "x", [None]])
def test_a_token_without_alternatives(top: Any) -> None:
    tokens = [{"token": "yes", "logprob": -0.5, "top_logprobs": top}]
    assert read_completion(body(logprobs={"content": tokens})).tokens()[0].alternatives == [("yes", -0.5)]


def test_half_a_character_is_no_error() -> None:
    data = json.dumps(body("a \ud83d cat \ud83d\ude00")).encode()
    assert read_completion(parse_body(data)).text == "a \ufffd cat \U0001f600"


def test_what_is_no_json_says_so() -> None:
    for data in (b"", b"<html>", b"{", b"[" * 100_000, b"data: \n\n", b": hi\n\n", b"\xff\xfe"):
        with pytest.raises(ValueError, match=r"."):
            parse_body(data)


# Any value at any place

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "text", "type", "parts", "refusal", "message", "token", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FULL = {
    **body("a cat", logprobs={"content": [{"token": "a", "logprob": -1.0, "top_logprobs": []}]}),
    "promptFeedback": {"blockReason": ""},
    "object": "chat.completion",
    "error": None,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def is_sound(found: Completion) -> None:
    assert isinstance(found.text, str)
    found.text.encode()
    (found.refusal or "").encode()
    found.finish.encode()
    assert 0 <= found.usage.prompt < 10**13
    assert 0 <= found.usage.completion < 10**13
    for token in found.tokens():
        assert all(math.exp(value) <= 1 for _, value in token.alternatives)


@quick
@given(st.sampled_from(places(FULL)), VALUES)
def test_any_value_at_any_place_is_read(place: tuple[Any, ...], value: Any) -> None:
    found = read_completion(parse_body(json.dumps(put(FULL, place, value)).encode()))
    is_sound(found)
    if place and place[0] != "usage":
        assert found.usage == Usage(10, 5), "what is paid is counted, whatever else is there"


@quick
@given(VALUES)
def test_any_value_at_all_is_read(value: Any) -> None:
    is_sound(read_completion(value))


@quick
@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_not(data: bytes) -> None:
    with suppress(ValueError):
        is_sound(read_completion(parse_body(data)))
