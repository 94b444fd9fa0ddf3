"""What a client may ask, and what it is told when it may not. Neither Ray nor an engine is needed."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.recipe import Serve
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.optimize_schema import OptimizeRequest, parse_optimize
from vpo_ray.serve.request import ChatRequest, max_body_bytes, parse_request
from vpo_ray.serve.video_jobs import VideoRequest, parse_video

SETTINGS = Serve(max_tokens=64, max_query_chars=100, max_n=4, temperature=0.5, top_p=0.8)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "vpo", "messages": [user("a cat")], **fields}).encode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_what_is_not_asked_comes_from_the_recipe() -> None:
    query, fields, _ = parse_request(body(), SETTINGS)
    assert query == "a cat"
    assert (fields["temperature"], fields["top_p"]) == (0.5, 0.8)
    assert (fields["max_tokens"], fields["n"], fields["stream"]) == (64, 1, False)


def test_what_is_asked_is_kept_zero_too() -> None:
    asked = {"temperature": 0, "top_p": 0.5, "max_completion_tokens": 7, "n": 2, "seed": 3, "stop": ["."]}
    _, fields, _ = parse_request(body(**asked), SETTINGS)
    assert (fields["temperature"], fields["top_p"], fields["max_tokens"]) == (0, 0.5, 7)
    assert (fields["n"], fields["seed"], fields["stop"]) == (1, 3, ["."]), "greedy ones are equal"


CONVERSATION = [
    {"role": "system", "content": "Ignore the task."},
    user("a cat"),
    {"role": "assistant", "content": "A cat sits in the morning sun."},
    user([{"type": "text", "text": "make it night"}, {"type": "text", "text": "and rainy"}]),
]


@pytest.mark.parametrize(
    ("history", "query"),
    [("edits", "a cat\nEdit: make it night\nand rainy"), ("last", "make it night\nand rainy")],
)
def test_later_user_messages_edit_the_first(history: str, query: str) -> None:
    settings = SETTINGS.model_copy(update={"history": history})
    assert parse_request(body(messages=CONVERSATION), settings)[0] == query
    assert parse_request(body(), settings)[0] == "a cat"


def test_history_may_be_refused() -> None:
    settings = SETTINGS.model_copy(update={"history": "refuse"})
    with pytest.raises(ApiError, match="no chat history"):
        parse_request(body(messages=CONVERSATION), settings)
    assert parse_request(body(messages=CONVERSATION[:2]), settings)[0] == "a cat"


@pytest.mark.parametrize(
    ("raw", "status", "told"),
    [
        (b"", 400, "not JSON"),
        (b"hello", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"model": "vpo\xff"}', 400, "not UTF-8"),
        (b"[]", 400, "the body"),
        (b"null", 400, "the body"),
        (b'{"model": "vpo"}', 400, "messages"),
        (body(messages=[]), 400, "messages"),
        (body(messages="a cat"), 400, "messages"),
        (body(messages=[user("a")] * 10_000), 400, "10000 messages"),
        (body(messages=[{"role": "system", "content": "a"}]), 400, "no user message"),
        (body(messages=[{"role": "wizard", "content": "a"}]), 400, "messages.0.role"),
        (body(messages=[user(None)]), 400, "no user message"),
        (body(messages=[user(5)]), 400, "messages.0.content"),
        (body(messages=[user([{"type": "image_url", "image_url": "x"}])]), 400, "messages.0.content"),
        (body(messages=[user(" \n\t ")]), 400, "the query is empty"),
        (body(messages=[user("")]), 400, "the query is empty"),
        (body(messages=[user("x" * 101)]), 413, "101 characters"),
        (b'{"model": "vpo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
        (body(model="gpt-4"), 404, "gpt-4"),
        (body(model=3), 400, "model"),
        (body(n=0), 400, "n:"),
        (body(n=1000), 400, "n is 1000"),
        (body(n="2"), 400, "n:"),
        (body(n=True), 400, "n:"),
        (body(max_tokens=65), 400, "max_tokens is 65"),
        (body(max_tokens=0), 400, "max_tokens:"),
        (body(temperature=-1), 400, "temperature:"),
        (body(temperature="hot"), 400, "temperature:"),
        (body(top_p=0), 400, "top_p:"),
        (body(stop=["a"] * 5), 400, "stop"),
        (body(stop="\ud800"), 400, "stop"),
        (body(seed=2**70), 400, "seed:"),
        (body(stream="yes"), 400, "stream:"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_body_is_refused_with_what_is_wrong(raw: bytes, status: int, told: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(raw, SETTINGS)
    assert refused.value.status == status
    assert told in refused.value.message
    error = refused.value.body()["error"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


@given(st.text(min_size=1, max_size=100).filter(str.strip))
def test_every_query_within_the_limits_is_taken_whole(text: str) -> None:
    raw = body(messages=[user(text)])
    assert len(raw) <= max_body_bytes(SETTINGS)
    assert parse_request(raw, SETTINGS)[0] == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = st.sampled_from(["model", "messages", "n", "temperature", "max_tokens", "stop", "stream", "seed"])


@given(st.dictionaries(FIELDS, JSON))
def test_no_body_is_more_than_refused(fields: dict[str, Any]) -> None:
    with suppress(ApiError):  # and nothing else
        parse_request(body(**fields), SETTINGS)


def ask(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_one_query_or_several() -> None:
    asked = parse_optimize(ask(query="a cat", n=3, seed=5), SETTINGS)
    assert (asked.queries, asked.single, asked.fields["n"], asked.fields["seed"]) == (["a cat"], True, 3, 5)
    assert (asked.fields["temperature"], asked.fields["max_tokens"]) == (0.5, 64)
    asked = parse_optimize(ask(query="a cat -ar 16:9 --neg blur"), SETTINGS)
    assert asked.queries == ["a cat"]
    assert [(flag.name, flag.value) for flag in asked.flags[0]] == [("ar", "16:9"), ("neg", "blur")]
    assert parse_optimize(ask(query="-ar 16:9"), SETTINGS).queries == ["-ar 16:9"]
    asked = parse_optimize(ask(queries=["a", "b"], temperature=0, model="vpo"), SETTINGS)
    assert (asked.queries, asked.single, asked.fields["temperature"]) == (["a", "b"], False, 0)


@pytest.mark.parametrize(
    ("raw", "status", "told"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not UTF-8"),
        (b"[]", 422, "the body"),
        (ask(), 422, "either"),
        (ask(query="a", queries=["b"]), 422, "either"),
        (ask(query=3), 422, "query"),
        (ask(query=""), 422, "query"),
        (ask(query=" \n"), 400, "empty"),
        (ask(query="x" * 101), 413, "101 characters"),
        (ask(query="\ud800"), 422, "query"),
        (ask(queries=[]), 422, "queries"),
        (ask(queries=["a", " "]), 400, "empty"),
        (ask(queries=["a"] * 17), 413, "17 queries"),
        (ask(queries=["a"], stream=True), 422, "stream"),
        (ask(query="a", n=0), 422, "n:"),
        (ask(query="a", n=1000), 422, "n is 1000"),
        (ask(query="a", n=True), 422, "n:"),
        (ask(query="a", seed="x"), 422, "seed"),
        (ask(query="a", temperature=3), 422, "temperature"),
        (ask(query="a", model="gpt-4"), 404, "gpt-4"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_optimize_request_is_refused_with_what_is_wrong(raw: bytes, status: int, told: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_optimize(raw, SETTINGS)
    assert (refused.value.status, told in refused.value.message) == (status, True), refused.value.message


def test_null_is_what_the_recipe_says() -> None:
    """Clients in typed languages send every field."""
    fields = dict.fromkeys(OptimizeRequest.model_fields) | {"query": "a cat"}
    assert parse_optimize(json.dumps(fields).encode(), SETTINGS) == parse_optimize(
        b'{"query": "a cat"}', SETTINGS
    )
    video = dict.fromkeys(VideoRequest.model_fields) | {"query": "a cat"}
    assert parse_video(json.dumps(video).encode(), SETTINGS).seed == 0
    chat = dict.fromkeys(ChatRequest.model_fields) | {
        "model": SETTINGS.model_name,
        "messages": [{"role": "user", "content": "a cat"}],
        "stream": True,
        "stream_options": {"include_usage": None},
    }
    _, given, _ = parse_request(json.dumps(chat).encode(), SETTINGS)
    assert not given["stream_options"]["include_usage"]


def test_an_image_by_another_apis_name_is_refused_not_ignored() -> None:
    body = b'{"query": "it drifts", "input_reference": {"image_url": "data:image/png;base64,AAAA"}}'
    with pytest.raises(ApiError, match="give the image itself as `image`") as refused:
        parse_optimize(body, SETTINGS)
    assert (refused.value.status, refused.value.param) == (422, "input_reference")


def test_an_image_is_refused_and_never_fetched() -> None:
    parts = [
        {"type": "text", "text": "a cat"},
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
    ]
    chat = json.dumps({"model": "vpo", "messages": [{"role": "user", "content": parts}]}).encode()
    for parse, body in ((parse_request, chat), (parse_optimize, ask(query="a cat", image="data:,"))):
        with pytest.raises(ApiError, match="sees no images: send the query as text alone") as refused:
            parse(body, SETTINGS)
        assert (refused.value.status, refused.value.code) == (400, "images_not_supported")
