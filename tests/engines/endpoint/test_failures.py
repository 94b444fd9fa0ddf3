"""Errors of endpoints: about one input, about the key, about the schema, or about nothing of these."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure

from vpo_ray.engines.chat import Answer, ChatError, Refusal, Sampling
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.endpoint.client import MAX_FORBIDDEN, EndpointClient, EndpointError
from vpo_ray.engines.endpoint.failures import about
from vpo_ray.prompts.answers import object_schema
from vpo_ray.recipe import ChatModel, Endpoint

SAMPLING = Sampling(temperature=0.5, max_tokens=50, seed=3)
SCHEMA = object_schema({"a": {"type": "string", "enum": ["yes", "no"]}})
GOOD = '{"a": "yes"}'
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[Any]]:
    """What comes of questions that are asked one after the other, or at once."""

    def asked(
        server: EndpointServer, *questions: str, schema: Any = None, at_once: bool = False, **options: Any
    ) -> list[Any]:
        endpoint = Endpoint(api_key_env=None, **{"base_url": server.url, "retries": 2, **options})
        client = EndpointClient(endpoint, "m", "judge.endpoint")
        model = ChatModel(model="m", backend="openai", endpoint=endpoint)
        chat = OpenAIChat(model, client, Answers(str(tmp_path), "one"), Account())

        async def all_of_them() -> list[Any]:
            async with client:
                work = [chat.complete([{"role": "user", "content": q}], SAMPLING, schema) for q in questions]
                if at_once:
                    return await asyncio.gather(*work, return_exceptions=True)
                return [(await asyncio.gather(each, return_exceptions=True))[0] for each in work]

        return asyncio.run(all_of_them())

    return asked


FILTERED = {"hate": {"filtered": True, "severity": "high"}}
AZURE = {
    "code": "content_filter",
    "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED},
}
OF_INPUT: list[tuple[int, Any]] = [
    (403, {"code": 403, "message": "this model requires moderation, and your input was flagged for violence",
           "metadata": {"reasons": ["violence"], "flagged_input": "a cat"}}),
    (403, {"message": "Your input was flagged for sexual/minors"}),
    (403, {"message": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_CSAM"}),
    (400, {"message": "The response was filtered due to the prompt triggering our policy", **AZURE}),
    (400, {"message": "bad request", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
    (400, {"message": "Your request was rejected", "type": "user_error", "code": "moderation_blocked"}),
    (400, {"message": "refused", "code": "content_policy_violation"}),
    (400, {"message": "Invalid prompt: it may violate our policy", "code": "invalid_prompt"}),
    (400, {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"}),
    (400, {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}),
    (400, {"code": "DataInspectionFailed", "message": "x"}),
    (400, {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}),
    (400, {"code": "InputTextSensitiveContentDetected", "message": "x"}),
    (400, {"status": "INVALID_ARGUMENT", "message": "blocked: PROHIBITED_CONTENT"}),
    (400, {"message": "Content Exists Risk", "code": "invalid_request_error"}),
    (400, {"message": "The request was rejected because it was considered high risk"}),
    (424, {"message": "Prompt blocked due to security configurations", "code": 2016}),
    (422, {"message": "The prompt was rejected by our content moderation"}),
    (451, {"message": "unavailable for legal reasons"}),
    (451, "blocked"),
    (500, {"code": "content_filter", "message": "x"}),
    (503, {"message": "x", "promptFeedback": {"blockReason": "SAFETY"}}),
]  # fmt: skip
NOT_OF_INPUT: list[tuple[int, Any, str]] = [
    (401, {"message": "Incorrect API key provided", "code": "invalid_api_key"}, "account"),
    (403, {"message": "Your account has been suspended for violating our usage policies"}, "account"),
    (403, {"message": "This organization has been disabled", "type": "policy_violation"}, "account"),
    (403, {"message": "Country, region, or territory not supported"}, "account"),
    (403, {"message": "Key limit exceeded (total limit)"}, "account"),
    (403, {"message": "Forbidden"}, "either"),
    (403, "<html>Access denied by our firewall, for safety reasons</html>", "either"),
    (404, {"message": "No endpoints found matching your data policy"}, "other"),
    (400, {"message": "max context length is 8192"}, "other"),
    (429, {"message": "rate limit", "code": "rate_limit_exceeded"}, "other"),
    (500, {"message": "the moderation service is down"}, "other"),
]


@pytest.mark.parametrize(("status", "error"), OF_INPUT)
def test_a_refused_input_is_known_by_what_is_said(status: int, error: Any) -> None:
    assert about(status, error, str({"error": error})) == "input"


@pytest.mark.parametrize(("status", "error", "subject"), NOT_OF_INPUT)
def test_other_errors_are_none(status: int, error: Any, subject: str) -> None:
    assert about(status, error, str({"error": error})) == subject


@pytest.mark.parametrize(("status", "error"), [OF_INPUT[0], OF_INPUT[3], OF_INPUT[9], OF_INPUT[20]])
def test_a_refused_input_is_the_refusal_of_its_row(
    status: int, error: Any, serve_endpoint: Serve, ask: Any
) -> None:
    bad = Reply({"error": error}, status)
    server = serve_endpoint(lambda r: bad if "bad" in r["messages"][0]["content"] else completion("fine"))
    for schema in (None, SCHEMA):
        [refusal] = ask(server, "bad", schema=schema)
        assert isinstance(refusal, Refusal), refusal
    assert len(server.requests) == 2, "neither a retry nor another try in words"
    assert ask(server, "good")[0].text == "fine"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"code": "The caller has no permission", "error": "Content violates usage guidelines. API key "
               "ID: 1, failed check: SAFETY_CHECK_TYPE_BIO"}),
        (400, [{"error": {"code": 400, "message": "Blocked: PROHIBITED_CONTENT"}}]),
        (400, {"detail": "The input was flagged by our content filter"}),
    ],
)  # fmt: skip
def test_all_that_an_error_says_is_looked_at(status: int, body: Any, serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(lambda _: Reply(body, status))
    [refusal] = ask(server, "bad")
    assert isinstance(refusal, Refusal), refusal
    assert any(word in str(refusal) for word in ("SAFETY_CHECK", "PROHIBITED", "flagged"))


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 403, "message": "Your input was flagged"}},
        {"error": {"code": "content_filter", "message": "x"}},
        {"error": "The prompt was blocked by our content policy"},
        {"choices": None, "base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}},
        {"choices": [{"message": {"content": ""}, "finish_reason": "error",
                      "error": {"code": 403, "message": "x", "metadata": {"flagged_input": "bad"}}}]},
    ],
)  # fmt: skip
def test_a_refusal_that_comes_as_200(body: Any, serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(lambda _: Reply(body))
    assert isinstance(ask(server, "bad")[0], Refusal)
    assert len(server.requests) == 1


def test_a_refused_key_that_comes_as_200(serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(lambda _: Reply({"error": {"code": 401, "message": "No auth credentials found"}}))
    assert isinstance(ask(server, "bad")[0], EndpointError)


def test_an_unclear_403_stops_the_run_unless_the_key_was_good(serve_endpoint: Serve, ask: Any) -> None:
    def reply(request: Request) -> Reply:
        bad = "bad" in request["messages"][0]["content"]
        return failure(403, "Forbidden") if bad else completion("fine")

    server = serve_endpoint(reply)
    assert isinstance(ask(server, "bad 0")[0], EndpointError)
    good, first, again, second = ask(server, "good", "bad 1", "good 2", "bad 2")
    assert (good.text, again.text) == ("fine", "fine")
    assert isinstance(first, Refusal)
    assert isinstance(second, Refusal)
    found = ask(server, "good 3", *(f"bad {i}" for i in range(10, 10 + MAX_FORBIDDEN)))
    assert [type(item) for item in found] == [Answer, *[Refusal] * (MAX_FORBIDDEN - 1), EndpointError], (
        "nothing but 403 is about the key after all"
    )


# Schemas that are refused

NO_SCHEMA = [
    (400, "Unknown parameter: 'response_format'."),
    (400, "Bad request"),
    (404, "No endpoints found that can handle the requested parameters: structured_outputs"),
    (404, "not found"),
    (415, "unsupported"),
    (422, "Extra inputs are not permitted"),
    (422, "不支持的参数"),
    (500, "Failed to compile json grammar"),
    (501, "Not implemented"),
    (503, "guided decoding is off"),
]


@pytest.mark.parametrize(("status", "says"), NO_SCHEMA)
def test_a_server_that_refuses_schemas_is_asked_in_words(
    status: int, says: str, serve_endpoint: Serve, ask: Any
) -> None:
    def reply(request: Request) -> Reply:
        return failure(status, says) if "response_format" in request else completion(GOOD)

    server = serve_endpoint(reply)
    assert [answer.text for answer in ask(server, "1", "2", "3", schema=SCHEMA)] == [GOOD] * 3
    assert ["response_format" in request for request in server.requests] == [True, False, False, False]
    said = server.requests[1]["messages"][-1]["content"]
    assert said.startswith("1\n")
    assert '"enum": ["yes", "no"]' in said
    [error] = ask(server, "4", schema=SCHEMA, structured="json_schema", retries=0)
    assert isinstance(error, ChatError | EndpointError), "as the recipe says"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_server_that_fails_at_schemas_is_asked_in_words(
    at_once: bool, serve_endpoint: Serve, ask: Any
) -> None:
    server = serve_endpoint(lambda r: failure(502, "x") if "response_format" in r else completion(GOOD))
    found = ask(server, *map(str, range(6)), schema=SCHEMA, at_once=at_once, retries=1)
    assert [answer.text for answer in found] == [GOOD] * 6
    assert at_once or sum("response_format" in request for request in server.requests) == 2 * 2


def test_a_server_that_comes_back_is_asked_with_schemas(serve_endpoint: Serve, ask: Any) -> None:
    replies = iter([failure(500, "x"), failure(500, "x")])
    server = serve_endpoint(lambda _: next(replies, completion(GOOD)))
    assert [a.text for a in ask(server, "1", "2", "3", schema=SCHEMA, retries=1)] == [GOOD] * 3
    assert ["response_format" in r for r in server.requests] == [True, True, False, True, True]


def test_many_at_once_agree(serve_endpoint: Serve, ask: Any) -> None:
    def reply(request: Request) -> Reply:
        return failure(400, "no") if "response_format" in request else completion(GOOD)

    server = serve_endpoint(reply)
    found = ask(server, *map(str, range(12)), schema=SCHEMA, at_once=True, concurrency=4)
    assert [answer.text for answer in found] == [GOOD] * 12


@pytest.mark.parametrize(
    ("status", "says", "error", "requests"),
    [
        (401, "bad key for response_format", EndpointError, 1),
        (402, "no credit", EndpointError, 1),
        (400, "the context length is exceeded", ChatError, 1),
        (413, "too large", ChatError, 1),
        (400, "temperature must be 1", ChatError, 2),
        (404, "no such model", EndpointError, 2),
        (429, "too many", ChatError, 3),
        (500, "out of order", ChatError, 6),
    ],
)
def test_other_errors_are_not_taken_for_it(
    status: int, says: str, error: type, requests: int, serve_endpoint: Serve, ask: Any
) -> None:
    server = serve_endpoint(lambda _: failure(status, says))
    [found] = ask(server, "1", schema=SCHEMA)
    assert type(found) is error
    assert says in str(found)
    assert len(server.requests) == requests


def test_a_server_that_took_a_schema_is_not_tried_without(serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(
        lambda r: failure(422, "no") if r["messages"][0]["content"] == "bad" else completion(GOOD)
    )
    for at_once in (False, True):
        good, bad = ask(server, f"good {at_once}", "bad", schema=SCHEMA, at_once=at_once)
        assert good.text == GOOD
        assert isinstance(bad, ChatError)
    assert len(server.requests) == 4


def test_a_server_that_refuses_everything_is_not_asked_twice_for_ever(
    serve_endpoint: Serve, ask: Any
) -> None:
    server = serve_endpoint(lambda _: failure(400, "no"))
    assert all(isinstance(e, ChatError) for e in ask(server, *map(str, range(8)), schema=SCHEMA))
    assert len(server.requests) == 8 + 3


def test_an_address_that_leads_elsewhere_without_the_question_says_where(
    serve_endpoint: Serve, ask: Any
) -> None:
    """A 301 makes a GET of the question, which a server answers with 405."""
    server = serve_endpoint(lambda _: Reply("", 301, {"Location": "https://127.0.0.1:1/v1/chat/completions"}))
    elsewhere = serve_endpoint(lambda _: failure(405))
    server.reply = lambda _: Reply("", 301, {"Location": f"{elsewhere.url}/chat/completions"})
    (error,) = ask(server, "q")
    assert isinstance(error, EndpointError)
    assert f"leads to {elsewhere.url}/chat/completions: give that in base_url" in str(error)
    assert len(server.requests) == 1


def test_the_query_of_an_address_goes_with_every_request(serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    (answer,) = ask(server, "q", base_url=f"{server.url}?api-version=2024-10-21&x=")
    assert answer.text == "a cat"
    assert server.paths == ["/v1/chat/completions?api-version=2024-10-21&x="]


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"function": {"name": "answer", "arguments": GOOD}}]},
        {"content": "", "tool_calls": [{"function": {"name": "answer", "arguments": {"a": "yes"}}}]},
        {"content": None, "function_call": {"name": "answer", "arguments": GOOD}},
        {"content": [{"type": "tool_use", "name": "answer", "input": {"a": "yes"}}]},
    ],
)
def test_an_answer_may_be_the_call_of_a_tool(message: Any, serve_endpoint: Serve, ask: Any) -> None:
    whole = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "tool_calls"}]}
    server = serve_endpoint(lambda _: Reply(whole))
    (answer,) = ask(server, "q", schema=SCHEMA)
    assert (answer.text, len(server.requests)) == (GOOD, 1)
    (none,) = ask(server, "another")
    assert isinstance(none, ChatError), "nothing was asked for in JSON"


def test_a_pause_of_hours_stops_the_run_and_fails_no_row(serve_endpoint: Serve, ask: Any) -> None:
    server = serve_endpoint(lambda _: failure(429, "the day's requests are used", retry_after="3600"))
    (error,) = ask(server, "q")
    assert isinstance(error, EndpointError)
    assert "judge.endpoint asks for a pause of 3,600 s, run again then" in str(error)
    assert len(server.requests) == 1


def test_a_pause_that_an_error_asks_for_in_words_is_made(
    serve_endpoint: Serve, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", short)
    told = Reply(
        {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "36s"}]}}, 429
    )
    server = serve_endpoint(lambda _: told if len(server.requests) < 2 else completion("a cat"))
    (answer,) = ask(server, "q")
    assert answer.text == "a cat"
    assert max(waited) >= 36
