"""The services that the ingress asks obey every key of their endpoint, or a recipe with it is refused."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure
from pydantic import ValidationError

from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.recipe import ChatModel, Checklist, Endpoint, Reward
from vpo_ray.recipe.serve import BestOf, Safety, Service
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.safety import Gate, SafetyVerdict

Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
SAFE = {"reason": "harmless", "unsafe": False}
UNSAFE = {"reason": "a knife", "unsafe": True}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.01)


def gate(server: EndpointServer, on_error: str = "refuse", **keys: Any) -> Gate:
    more = {key: keys.pop(key) for key in ("chat_template_kwargs",) if key in keys}
    endpoint = {"base_url": server.url, "api_key_env": None, **keys}
    return Gate(Safety(query="refuse", judge={"model": "m", "endpoint": endpoint, **more}, on_error=on_error))


def checked(gate: Gate, text: str = "a cat") -> SafetyVerdict:
    return asyncio.run(gate.check(text))


def test_a_strict_server_takes_the_schema(serve_endpoint: Serve) -> None:
    """OpenAI's strict mode refuses limits of lengths and of numbers."""

    def reply(request: Request) -> Reply:
        sent = json.dumps(request["response_format"])
        assert request["response_format"]["json_schema"]["strict"] is True
        if any(word in sent for word in ("maxLength", "minimum", "maximum")):
            return failure(400, "Invalid schema for response_format 'answer'")
        return completion(UNSAFE if "unsafe" in sent else {"critique": "good", "score": 9})

    server = serve_endpoint(reply)
    assert checked(gate(server)).reason == "judged unsafe: a knife"
    judge = {"model": "m", "endpoint": {"base_url": server.url, "api_key_env": None}}
    ranks = asyncio.run(Ranker(BestOf(judge=judge)).rank("a cat", ["one"]))
    assert ranks is not None
    assert (ranks[0].score, ranks[0].reason) == (9, "good")
    assert len(server.requests) == 2


def test_keys_of_the_endpoint_are_obeyed(serve_endpoint: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve_endpoint(lambda _: completion(SAFE))
    request = {"max_tokens": None, "max_completion_tokens": 512}
    off = {"enable_thinking": False}
    assert (
        checked(gate(server, request=request, structured="text", chat_template_kwargs=off)) == SafetyVerdict()
    )
    [sent] = server.requests
    assert (sent["max_completion_tokens"], sent["chat_template_kwargs"]) == (512, off)
    assert not {"max_tokens", "response_format"} & sent.keys()
    assert '"unsafe"' in sent["messages"][0]["content"].rpartition("JSON schema")[2]

    monkeypatch.setenv("AZURE_KEY", "abc")
    azure = {"azure_api_version": "2024-10-21", "api_key_env": "AZURE_KEY"}
    checked(gate(server, base_url=server.url.removesuffix("/v1"), **azure))
    assert server.paths[-1] == "/openai/deployments/m/chat/completions?api-version=2024-10-21"
    assert server.seen_headers[-1]["api-key"] == "abc"


def test_a_budget_and_its_concurrency_are_kept(serve_endpoint: Serve) -> None:
    server, start = serve_endpoint(lambda _: completion(SAFE)), time.monotonic()
    asyncio.run(gate(server, requests_per_minute=1200, concurrency=1).check_all(["a"] * 5))
    assert server.most_under_way == 1
    assert server.times[-1] - start >= 0.2


def test_a_server_without_schemas_is_asked_in_words(serve_endpoint: Serve) -> None:
    server = serve_endpoint(lambda r: failure(400, "no") if "response_format" in r else completion(UNSAFE))
    one = gate(server, on_error="pass")

    async def twice() -> list[SafetyVerdict]:
        return [await one.check("a"), await one.check("b")]

    assert all(verdict.flagged for verdict in asyncio.run(twice()))
    assert ["response_format" in r for r in server.requests] == [True, False, False]


@pytest.mark.parametrize(
    "form", ["```json\n%s\n```", "<think>%s?</think>%s", "I say: %s.", '{"unsafe": true}']
)
def test_an_answer_among_other_text_is_read(form: str, serve_endpoint: Serve) -> None:
    server = serve_endpoint(lambda _: completion(form.replace("%s", json.dumps(UNSAFE))))
    assert checked(gate(server, on_error="pass")).flagged


@pytest.mark.parametrize(
    "reply",
    [
        failure(403, "your input was flagged"),
        failure(400, "no", code="content_filter"),
        completion(None, refusal="I cannot"),
        completion("", finish="content_filter"),
    ],
)
def test_a_text_that_the_judge_s_own_filter_takes_is_flagged(reply: Reply, serve_endpoint: Serve) -> None:
    assert checked(gate(serve_endpoint(lambda _: reply), on_error="pass")).flagged


def test_a_service_that_fails_once_is_asked_again(serve_endpoint: Serve) -> None:
    replies = iter([failure(500), completion(UNSAFE)])
    assert checked(gate(serve_endpoint(lambda _: next(replies)), on_error="pass")).flagged


def test_a_server_that_wants_to_be_left_alone_is_not_waited_for(serve_endpoint: Serve) -> None:
    server = serve_endpoint(lambda _: failure(429, Retry_After="300"))
    assert checked(gate(server, timeout_s=0.1, retries=0)).unavailable


def test_errors_tell_no_text(serve_endpoint: Serve, caplog: pytest.LogCaptureFixture) -> None:
    for reply in (failure(400, "about a zebra"), failure(500, "about a zebra"), completion("a zebra")):
        checked(gate(serve_endpoint(lambda _, reply=reply: reply), retries=0), "a zebra")
    assert "zebra" not in caplog.text
    assert "safety.judge" in caplog.text


def test_a_service_answers_soon_unless_the_recipe_says_otherwise() -> None:
    endpoint = Service(model="m", endpoint={"base_url": "http://x/v1"}).endpoint
    assert (endpoint.timeout_s, endpoint.retries) == (10, 1)
    assert Service(model="m", endpoint={"timeout_s": 3}).endpoint.timeout_s == 3
    again = Service.model_validate(Service(model="m", endpoint={"retries": 4}).model_dump())
    assert again.endpoint.retries == 4


KEYS: dict[str, Any] = {
    "prompt_price": 1, "completion_price": 1, "answers": "x", "logprobs": False, "structured": "text",
    "azure_api_version": "1", "tokens_per_minute": 5,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_does_nothing_is_refused_by_name(key: str) -> None:
    service = {"model": "m", "endpoint": {key: KEYS[key]}}
    refused: list[Callable[[], Any]] = [
        lambda: Safety(query="refuse", moderation=service),
        lambda: BestOf(rerank=service),
    ]
    if key in ("prompt_price", "completion_price", "answers", "logprobs"):
        refused += [lambda: Safety(query="refuse", judge=service), lambda: BestOf(judge=service)]
    else:
        assert Safety(query="refuse", judge=service)
    if key == "logprobs":
        refused.append(lambda: ChatModel(model="m", endpoint=Endpoint(logprobs=False)))
    if key == "answers":
        questions = Checklist(file="x")
        refused.append(lambda: Reward(model="m", checklist=questions, endpoint=Endpoint(answers="x")))
    for make in refused:
        with pytest.raises(ValidationError, match=rf"endpoint\.{key} does nothing"):
            make()


def test_template_arguments_are_for_chats_alone() -> None:
    service = {"model": "m", "chat_template_kwargs": {"enable_thinking": False}}
    for make in (lambda: Safety(query="refuse", moderation=service), lambda: BestOf(rerank=service)):
        with pytest.raises(ValidationError, match="chat_template_kwargs does nothing"):
            make()
