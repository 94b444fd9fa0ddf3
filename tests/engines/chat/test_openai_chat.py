"""Questions to an endpoint that behaves in every bad way: each is answered once, paid once, or counted."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure
from pydantic import ValidationError

from vpo_ray.engines.chat import Answer, ChatError, Metered, Refusal, Sampling
from vpo_ray.engines.chat.openai_chat import Account, Answers, CostLimitReached, OpenAIChat
from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.engines.endpoint.client import EndpointClient, EndpointError
from vpo_ray.engines.endpoint.rate_limiter import retry_after
from vpo_ray.prompts.answers import object_schema, string_schema
from vpo_ray.recipe import ChatModel, Endpoint

ASK = [{"role": "user", "content": "what is it?"}]
SAMPLING = Sampling(temperature=0.5, max_tokens=50, seed=3, top_p=0.9)
SCHEMA = object_schema({"verdict": {"type": "string", "enum": ["yes", "no"]}, "why": string_schema(5)})
GOOD = {"verdict": "yes", "why": "because it is so"}
SECRET = "sk-very-secret-0123456789"

Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
Make = Callable[..., OpenAIChat]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.02)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A chat on a server, as the run "one" or another would have it."""
    monkeypatch.setenv("TEST_KEY", SECRET)

    def chat(
        server: EndpointServer | str, run: str = "one", limit: float | None = None, **options: Any
    ) -> OpenAIChat:
        url = server if isinstance(server, str) else server.url
        endpoint = Endpoint(
            **{"base_url": url, "api_key_env": "TEST_KEY", "retries": 2, "timeout_s": 5, **options}
        )
        model = ChatModel(model="m", backend="openai", endpoint=endpoint)
        spent = [0.0]

        async def add(cost: float) -> float:
            spent[0] += cost
            return spent[0]

        client = EndpointClient(endpoint, "m", "judge.endpoint")
        return OpenAIChat(model, client, Answers(str(tmp_path / "answers"), run), Account(add, limit))

    return chat


def ask(chat: OpenAIChat, *questions: str, schema: Any = None) -> list[Any]:
    """Answers, or what was raised, to questions that are asked at once."""

    async def all_of_them() -> list[Any]:
        async with chat.client:
            asked = [[{"role": "user", "content": text}] for text in questions or ("what is it?",)]
            return await asyncio.gather(
                *(chat.complete(messages, SAMPLING, schema) for messages in asked), return_exceptions=True
            )

    return asyncio.run(all_of_them())


def in_turn(*replies: Reply) -> Callable[[Request], Reply]:
    """Replies one after the other, the last one for ever."""
    rest: Iterator[Reply] = iter(replies)
    lock = threading.Lock()
    current = [replies[0]]

    def reply(_: Request) -> Reply:
        with lock:
            current[0] = next(rest, current[0])
            return current[0]

    return reply


# What is sent and read


def test_a_question_and_its_answer(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    chat = make(server, prompt_price=2.0, completion_price=10.0)
    assert ask(chat) == [Answer("a cat", "stop", 1000, 100, pytest.approx(0.003))]
    [request] = server.requests
    assert request == {
        "model": "m", "messages": ASK, "temperature": 0.5, "top_p": 0.9, "max_tokens": 50, "seed": 3
    }  # fmt: skip
    assert server.seen_headers[0]["authorization"] == f"Bearer {SECRET}"
    assert server.paths == ["/v1/chat/completions"]


def test_the_recipe_may_change_a_request(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    more = {"max_tokens": None, "max_completion_tokens": 99, "temperature": None, "top_k": 4}
    ask(make(server, request=more))
    [request] = server.requests
    assert "max_tokens" not in request
    assert "temperature" not in request
    assert (request["max_completion_tokens"], request["top_k"]) == (99, 4)


def test_azure_is_asked_its_own_way(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    ask(make(server.url.removesuffix("/v1"), azure_api_version="2024-10-21"))
    assert server.paths == ["/openai/deployments/m/chat/completions?api-version=2024-10-21"]
    assert server.seen_headers[0]["api-key"] == SECRET


def test_without_usage_nothing_is_counted(serve_endpoint: Serve, make: Make) -> None:
    [answer] = ask(make(serve_endpoint(lambda _: completion("a cat", usage=False)), prompt_price=5))
    assert answer == Answer("a cat", "stop", 0, 0, 0.0)


def test_no_more_requests_under_way_than_allowed(serve_endpoint: Serve, make: Make) -> None:
    def slow(_: Request) -> Reply:
        time.sleep(0.05)
        return completion("a cat")

    server = serve_endpoint(slow)
    ask(make(server, concurrency=4), *map(str, range(20)))
    assert len(server.requests) == 20
    assert server.most_under_way == 4


# Structured answers


def test_a_schema_is_asked_for_and_kept(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion(GOOD))
    [answer] = ask(make(server), schema=SCHEMA)
    assert json.loads(answer.text) == GOOD, "lengths are the grammar's matter, no fault of an answer"
    sent = server.requests[0]["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["strict"] is True
    assert sent["json_schema"]["schema"]["required"] == ["verdict", "why"]
    assert "maxLength" not in json.dumps(sent)


BAD = [
    "",
    "yes",
    "```json\n{}\n```",
    json.dumps({"verdict": "maybe", "why": ""}),
    json.dumps({"verdict": "yes"}),
    json.dumps({**GOOD, "more": 1}),
    json.dumps([GOOD]),
    '{"verdict": "yes", "why"',
]


@pytest.mark.parametrize("bad", BAD[1:])
def test_one_repair_round(bad: str, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(in_turn(completion(bad), completion(GOOD)))
    [answer] = ask(make(server, prompt_price=1), schema=SCHEMA)
    assert json.loads(answer.text) == GOOD
    assert (answer.prompt_tokens, answer.cost) == (2000, pytest.approx(0.002)), "both rounds are paid"
    first, second = server.requests
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][:2] == [*first["messages"], {"role": "assistant", "content": bad}]


@pytest.mark.parametrize("bad", BAD[1:])
def test_a_model_that_never_answers_in_the_grammar(bad: str, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion(bad))
    [error] = ask(make(server), schema=SCHEMA)
    assert isinstance(error, ChatError)
    assert "even after a repair round" in str(error)
    assert error.usage.prompt == 2000
    assert len(server.requests) == 2, "one repair round, and no answer is kept"


def test_a_server_without_schemas_is_asked_in_words(serve_endpoint: Serve, make: Make) -> None:
    def reply(request: Request) -> Reply:
        if "response_format" in request:
            return failure(400, "Unknown parameter: 'response_format'.")
        return completion(GOOD)

    server = serve_endpoint(reply)
    chat = make(server)
    assert json.loads(ask(chat, schema=SCHEMA)[0].text) == GOOD
    assert json.loads(ask(chat, "and this?", schema=SCHEMA)[0].text) == GOOD
    assert ["response_format" in request for request in server.requests] == [True, False, False]

    [error] = ask(make(server, structured="json_schema"), "again?", schema=SCHEMA)
    assert isinstance(error, ChatError)
    assert "response_format" in str(error)
    assert "response_format" not in server.requests[-1] or len(server.requests) == 4
    [answer] = ask(make(server, structured="text"), "in words?", schema=SCHEMA)
    assert json.loads(answer.text) == GOOD


# Outcomes that are no text


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (completion(None, refusal="I cannot help with that"), "the model refused: I cannot"),
        (completion("half of", finish="content_filter"), "a content filter stopped"),
        (failure(400, "The response was filtered", code="content_filter"), "was filtered"),
    ],
)
def test_a_refusal_is_no_answer(reply: Reply, says: str, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: reply)
    for schema in (None, SCHEMA):
        [error] = ask(make(server), schema=schema)
        assert isinstance(error, Refusal)
        assert says in str(error)
    assert len(server.requests) == 2, "asked once each: no retry, no repair"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (completion('{"verdict": "yes', finish="length"), "cut off at max_tokens 50"),
        (completion(None), "has no text"),
        (completion(""), "has no text"),
        (failure(400, "max context length is 8192"), "max context length"),
        (failure(413, "too large"), "too large"),
        (failure(422, "bad field"), "bad field"),
    ],
)
def test_an_error_of_one_question(reply: Reply, says: str, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda r: reply if r["messages"][0]["content"] == "bad" else completion(GOOD))
    error, good = ask(make(server), "bad", "good", schema=SCHEMA)
    assert isinstance(error, ChatError)
    assert not isinstance(error, Refusal)
    assert says in str(error)
    assert json.loads(good.text) == GOOD
    assert len(server.requests) == 2, "not asked again"


# Failures that pass


@pytest.mark.parametrize(
    "trouble",
    [
        failure(408),
        failure(409),
        failure(429),
        failure(500),
        failure(502),
        failure(503, "starting"),
        failure(529),
        Reply("<html>bad gateway</html>", 502, {"Content-Type": "text/html"}),
        Reply('{"id": "1", "choices": [{"ind'),
        Reply("<html>a proxy says hello</html>", 200, {"Content-Type": "text/html"}),
        Reply({"id": "1", "object": "chat.completion", "choices": []}),
        Reply({"surprise": True}),
        Reply([1, 2]),
        Reply(None),
        Reply(fault="cut"),
        Reply({"id": "x" * 5000}, fault="half"),
    ],
    ids=lambda reply: f"{reply.status} {reply.fault or str(reply.body)[:20]}",
)
def test_trouble_that_passes(trouble: Reply, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(in_turn(trouble, completion("a cat")))
    [answer] = ask(make(server))
    assert isinstance(answer, Answer), answer
    assert answer.text == "a cat"
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_a_server_that_stalls_is_asked_again(fault: str, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(in_turn(Reply("x" * 5000, fault=fault), completion("a cat")))
    began = time.monotonic()
    assert ask(make(server, timeout_s=0.4))[0].text == "a cat"
    assert 0.4 <= time.monotonic() - began < 25, "the server stalls for 30 s"


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (failure(500, "out of order"), "out of order"),
        (Reply(fault="half", body={"id": "x" * 5000}), "judge.endpoint"),
        (Reply("not json"), "not readable"),
    ],
)
def test_trouble_that_stays_is_one_question_s_error(
    trouble: Reply, says: str, serve_endpoint: Serve, make: Make
) -> None:
    server = serve_endpoint(in_turn(completion("fine"), trouble))
    chat = make(server)
    assert ask(chat, "first")[0].text == "fine"
    [error] = ask(chat, "second")
    assert isinstance(error, ChatError), error
    assert says in str(error)
    assert len(server.requests) == 1 + 3, "two retries"


def test_retry_after_is_obeyed_by_all(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(in_turn(failure(429, Retry_After="1"), completion("a cat")))
    chat = make(server, concurrency=1)
    assert [a.text for a in ask(chat, "a", "b", "c")] == ["a cat"] * 3
    first, *others = server.times
    assert min(others) - first >= 1.0, "the others wait too, not only the one that was told"


def test_a_pause_too_long_to_wait_for(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: failure(429, "come back tomorrow", Retry_After="86400"))
    [error] = ask(make(server))
    assert "come back tomorrow" in str(error)
    assert len(server.requests) == 1


def test_how_long_a_server_asks_to_wait() -> None:
    assert retry_after({"retry-after": "3"}) == 3.0
    assert retry_after({"retry-after": "0.5"}) == 0.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0
    for nonsense in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "-1"}):
        assert retry_after(nonsense) in (None, 0.0)


# Failures that stop a run


@pytest.mark.parametrize(
    "reply",
    [
        failure(401, "bad key"),
        failure(402, "no credit"),
        failure(403, "not for you"),
        failure(404, "no such model"),
        failure(429, "you exceeded your quota", code="insufficient_quota"),
    ],
)
def test_wrong_settings_stop_the_run(reply: Reply, serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: reply)
    [error] = ask(make(server))
    assert isinstance(error, EndpointError)
    assert error.stops_run
    assert reply.body["error"]["message"] in str(error)
    assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    server.close()
    [error] = ask(make(server))
    assert isinstance(error, EndpointError)
    assert f"cannot reach {server.url}" in str(error)


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "ftp://127.0.0.1/v1", "http://127.0.0.1:99999/v1", ""]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        Endpoint(base_url=url)


def test_a_name_that_no_one_knows(make: Make) -> None:
    [error] = ask(make("http://nowhere.invalid/v1", retries=0))
    assert isinstance(error, EndpointError)
    assert "cannot reach http://nowhere.invalid/v1" in str(error)


def test_a_key_that_is_not_set(make: Make, monkeypatch: pytest.MonkeyPatch, serve_endpoint: Serve) -> None:
    chat = make(serve_endpoint(lambda _: completion("a cat")))
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(EndpointError, match=r"judge.endpoint.api_key_env: the variable TEST_KEY"):
        ask(chat)


def test_the_key_is_never_told(serve_endpoint: Serve, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "vpo_ray")
    for status in (400, 401, 500):
        [error] = ask(make(serve_endpoint(lambda _, s=status: failure(s, f"your key {SECRET} is odd"))))
        assert "is odd" in str(error)
        assert SECRET not in str(error)
    assert SECRET not in caplog.text


# Paid once


def test_an_answer_is_kept_and_not_asked_for_again(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion(GOOD))
    first = ask(make(server, prompt_price=1), "a", "b", schema=SCHEMA)
    again = ask(make(server, prompt_price=1), "a", "b", schema=SCHEMA)
    assert again == first
    assert len(server.requests) == 2
    ask(make(server), "a")
    assert len(server.requests) == 3, "without the schema it is another question"
    ask(make(server, request={"n": 1}), "a", schema=SCHEMA)
    assert len(server.requests) == 4


def test_what_another_run_paid_for_is_free(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    ask(make(server, run="one", prompt_price=1))
    mine, other = make(server, run="one", prompt_price=1), make(server, run="two", prompt_price=1)
    assert (ask(mine)[0].cost, ask(other)[0].cost) == (pytest.approx(0.001), 0.0)
    assert (mine.account.spent, other.account.spent) == (pytest.approx(0.001), 0.0)
    assert len(server.requests) == 1


def test_a_damaged_answer_is_asked_for_again(serve_endpoint: Serve, make: Make, tmp_path: Path) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    ask(make(server))
    [kept] = (tmp_path / "answers").rglob("*.json")
    for damage in (b"", b"{", b"[]", b'{"answer": {"text": 1}}', b"\xff\xfe"):
        kept.write_bytes(damage)
        assert ask(make(server))[0].text == "a cat"
    assert len(server.requests) == 6


def test_the_limit_of_cost_stops_before_the_next_question(serve_endpoint: Serve, make: Make) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    chat = make(server, limit=0.005, prompt_price=1, concurrency=1)

    async def one_after_the_other() -> list[Any]:
        found: list[Any] = []
        async with chat.client:
            for i in range(8):
                asked = chat.complete([{"role": "user", "content": str(i)}], SAMPLING)
                found += await asyncio.gather(asked, return_exceptions=True)
        return found

    found = asyncio.run(one_after_the_other())
    assert [type(item).__name__ for item in found] == ["Answer"] * 5 + ["CostLimitReached"] * 3
    assert "limits.max_cost 0.005 is reached" in str(found[-1])
    assert len(server.requests) == 5
    # What is kept is free to read.
    again = make(server, limit=0.0001, prompt_price=1)
    assert ask(again, "0")[0].text == "a cat"


def test_what_is_under_way_at_the_limit_is_kept(serve_endpoint: Serve, make: Make) -> None:
    late = threading.Event()

    def reply(request: Request) -> Reply:
        if request["messages"][0]["content"] == "slow":
            late.wait(20)
        return completion("a cat")

    server = serve_endpoint(reply)
    chat = make(server, limit=0.001, prompt_price=1, concurrency=2)

    async def both() -> bool:
        async with chat.client:
            slow = asyncio.create_task(chat.complete([{"role": "user", "content": "slow"}], SAMPLING))
            await asyncio.sleep(0.2)
            await chat.complete([{"role": "user", "content": "fast"}], SAMPLING)
            refused = asyncio.create_task(chat.complete([{"role": "user", "content": "more"}], SAMPLING))
            assert not (await asyncio.wait([refused], timeout=0.3))[0], "it waits for the slow one"
            late.set()
            with pytest.raises(CostLimitReached):
                await refused
            return slow.done()

    assert asyncio.run(both())
    assert ask(make(server), "slow")[0].text == "a cat"
    assert len(server.requests) == 2


def test_a_row_s_turns_add_up_failed_ones_too(serve_endpoint: Serve, make: Make) -> None:
    replies = in_turn(completion("a cat"), completion(None, refusal="no"), completion("a dog"))
    chat = make(serve_endpoint(replies), prompt_price=1)

    async def turns() -> Metered:
        metered = Metered(chat)
        async with chat.client:
            await metered.complete([{"role": "user", "content": "a"}], SAMPLING)
            with pytest.raises(Refusal):
                await metered.complete([{"role": "user", "content": "b"}], SAMPLING)
            await metered.complete([{"role": "user", "content": "c"}], SAMPLING)
        return metered

    usage = asyncio.run(turns()).usage
    assert (usage.prompt, usage.completion, usage.cost) == (3000, 300, pytest.approx(0.003))


# The budget


def test_a_budget_of_requests_is_kept(serve_endpoint: Serve, make: Make) -> None:
    server, start = serve_endpoint(lambda _: completion("a cat")), time.monotonic()
    ask(make(server, requests_per_minute=600), *map(str, range(12)))
    assert server.times[-1] - start >= 1.0, "eleven spaces of a tenth of a second"
