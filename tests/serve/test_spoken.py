"""What leaves the endpoint is the prompt, whole or as a stream: no thought of the policy."""

import json
from typing import Any

import pytest

from vpo_ray.prompts.thoughts import UnclosedThought
from vpo_ray.serve.answers import DONE, chunks_in
from vpo_ray.serve.spoken import SpokenParts, marked, spoken

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def completion(*texts: str | None) -> dict[str, Any]:
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    return {"id": "1", "choices": choices, "usage": USAGE}


def contents(whole: dict[str, Any]) -> list[str | None]:
    return [choice["message"]["content"] for choice in whole["choices"]]


def test_a_completion_has_no_thoughts() -> None:
    whole = completion("<think>hm</think>\n\nA cat.", "A dog.", None, "hm</think> A fox.")
    assert [text and text.strip() for text in contents(spoken(whole))] == ["A cat.", "A dog.", None, "A fox."]
    assert spoken(whole)["usage"] == USAGE
    plain = completion("A cat.\n")
    assert spoken(plain) == plain


def test_a_choice_that_ends_within_a_thought_is_left_out() -> None:
    assert contents(spoken(completion("<think>hm", "A dog."))) == ["A dog."]
    with pytest.raises(UnclosedThought):
        spoken(completion("<think>hm", "[THINK]"))


def chunk(text: str | None, finish: str | None = None, index: int = 0) -> str:
    delta = {} if text is None else {"content": text}
    part = {"id": "1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(part, separators=(',', ':'))}\n\n"


ROLE = 'data: {"id":"1","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
LAST = f'data: {{"id":"1","choices":[],"usage":{json.dumps(USAGE)}}}\n\n'


def stream(*parts: str) -> list[str]:
    """What is sent, piece by piece."""
    spoken = SpokenParts()
    return [told for part in parts if (told := spoken.feed(part))]


def said(parts: list[str], index: int = 0) -> str:
    deltas = (c["delta"] for part in parts for whole in chunks_in(part) for c in whole["choices"]
              if c["index"] == index)  # fmt: skip
    return "".join(delta.get("content") or "" for delta in deltas)


def test_a_stream_without_thoughts_is_passed_on_as_it_is() -> None:
    parts = [ROLE, chunk("A "), chunk("cat."), chunk(None, "stop"), LAST, DONE]
    assert stream(*parts) == [ROLE + parts[1], *parts[2:]]


def test_a_stream_has_no_thoughts() -> None:
    text = "<think>\nA cat?\n</think>\n\nA ginger cat."
    parts = [ROLE, *(chunk(text[i : i + 3]) for i in range(0, len(text), 3)), chunk("", "stop"), LAST + DONE]
    told = stream(*parts)
    assert said(told).strip() == "A ginger cat."
    assert "think" not in "".join(told)
    assert told[-1] == LAST + DONE
    assert next(chunks_in(told[0]))["choices"][0]["delta"]["role"] == "assistant"


def test_choices_of_a_stream_think_by_themselves() -> None:
    parts = [
        chunk("<think>a", index=1),
        chunk("A dog."),
        chunk("</think>A cat.", "stop", 1),
        chunk("", "stop"),
    ]
    told = stream(*parts)
    assert (said(told), said(told, 1)) == ("A dog.", "A cat.")


def test_nothing_is_told_of_a_stream_that_ends_within_a_thought() -> None:
    spoken = SpokenParts()
    assert [spoken.feed(part) for part in (ROLE, chunk("<think>a"), chunk(" cat"))] == [""] * 3
    with pytest.raises(UnclosedThought):
        spoken.feed(chunk("", "length"))


def test_an_error_in_a_stream_is_told() -> None:
    error = 'data: {"error": {"message": "it broke off"}}\n\n'
    assert stream(ROLE, chunk("<think>a"), error)[-1].endswith(error)
    assert stream(ROLE, DONE) == [ROLE + DONE]


def test_the_mark_that_a_template_wrote_is_put_back() -> None:
    whole = json.loads(marked(json.dumps(completion("hm</think>A cat.", "hm")), "<think>\n", set()))
    assert contents(spoken(whole)) == ["A cat."]
    begun: set[int] = set()
    parts = [ROLE, chunk("hm"), chunk("</think>A"), chunk(" cat."), chunk("", "stop"), DONE]
    told = [marked(part, "<think>\n", begun) for part in parts]
    assert said(told) == "<think>\nhm</think>A cat."
    assert said(stream(*told)) == "A cat."
    with pytest.raises(UnclosedThought):
        stream(*(marked(part, "<think>\n", set()) for part in (chunk("A cat"), chunk("", "length"))))
