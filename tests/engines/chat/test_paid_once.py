"""An answer that came was paid for: it is counted, and never bought a second time because of its shape."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request

from vpo_ray.engines.chat import Answer, ChatError, Sampling
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint import client as endpoint_module
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.endpoint.client import EndpointClient
from vpo_ray.prompts.answers import object_schema
from vpo_ray.recipe import ChatModel, Endpoint

SAMPLING = Sampling(temperature=0.5, max_tokens=50, seed=3)
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY_S", 0.01)


def ask(server: EndpointServer, folder: Path, schema: Any = None) -> tuple[Any, Account]:
    """An answer, or what was raised, and what it cost at 1 a thousand tokens."""
    endpoint = Endpoint(
        base_url=server.url, api_key_env=None, retries=3, prompt_price=1000, completion_price=1000
    )
    account = Account()
    client = EndpointClient(endpoint, "m", "judge.endpoint")
    chat = OpenAIChat(
        ChatModel(model="m", backend="openai", endpoint=endpoint),
        client,
        Answers(str(folder), "one"),
        account,
    )

    async def once() -> Any:
        async with client:
            [said] = await asyncio.gather(
                chat.complete([{"role": "user", "content": "what?"}], SAMPLING, schema),
                return_exceptions=True,
            )
            return said

    return asyncio.run(once()), account


def reply(message: Any, **more: Any) -> Reply:
    return Reply({"choices": [{"finish_reason": "stop", "message": message, **more}], "usage": USAGE})


@pytest.mark.parametrize(
    "answer",
    [
        reply({"content": [{"type": "text", "text": "a cat"}]}),
        reply({"content": "a cat"}, finish_reason=0),
        reply({"content": "a cat"}, logprobs={"content": [{"token": 1, "top_logprobs": None}]}),
        reply({"content": "a cat", "role": None, "tool_calls": "none", "refusal": ""}),
        Reply(
            {"choices": [{"message": {"content": "a cat"}}], "usage": {k: float(v) for k, v in USAGE.items()}}
        ),
        Reply(
            {"choices": [{"message": {"content": "a cat"}}], "usage": {k: str(v) for k, v in USAGE.items()}}
        ),
    ],
)
def test_an_odd_answer_is_understood(answer: Reply, serve_endpoint: Serve, tmp_path: Path) -> None:
    server = serve_endpoint(lambda _: answer)
    said, account = ask(server, tmp_path)
    assert isinstance(said, Answer), said
    assert (said.text, len(server.requests)) == ("a cat", 1)
    assert account.spent == said.cost == pytest.approx(1.1)


@pytest.mark.parametrize(
    "answer",
    [
        reply(None),
        reply([]),
        reply({"content": None, "reasoning_content": "a cat, I think"}),
        reply({"content": [{"type": "thinking", "thinking": "a cat"}]}),
        Reply({"choices": None, "usage": USAGE}),
        Reply({"choices": [None], "usage": USAGE}),
        Reply({"choices": "a cat", "usage": USAGE}),
        Reply({"usage": USAGE}),
    ],
)
def test_what_cannot_be_understood_is_paid_once(answer: Reply, serve_endpoint: Serve, tmp_path: Path) -> None:
    server = serve_endpoint(lambda _: answer)
    error, account = ask(server, tmp_path)
    assert isinstance(error, ChatError), error
    assert len(server.requests) == 1
    assert account.spent == error.usage.cost == pytest.approx(1.1)


@pytest.mark.parametrize(
    "form", ["```json\n%s\n```", "<think>so?</think>\n%s", "It is %s I hope.", '[THINK]{"a": "no"}[/THINK]%s']
)
def test_an_object_among_other_text_costs_no_repair(form: str, serve_endpoint: Serve, tmp_path: Path) -> None:
    schema = object_schema({"a": {"enum": ["yes", "no"]}})
    server = serve_endpoint(lambda _: reply({"content": form.replace("%s", '{"a": "yes"}')}))
    said, _ = ask(server, tmp_path, schema)
    assert (said.text, len(server.requests)) == ('{"a": "yes"}', 1)
    again, _ = ask(server, tmp_path, schema)
    assert (again, len(server.requests)) == (said, 1), "what is kept is the object"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_that_stands_where_thoughts_do_is_read(
    field: str, serve_endpoint: Serve, tmp_path: Path
) -> None:
    schema = object_schema({"a": {"enum": ["yes", "no"]}})
    server = serve_endpoint(lambda _: reply({"content": None, field: '{"a": "yes"}'}))
    said, account = ask(server, tmp_path, schema)
    assert (said.text, len(server.requests), account.spent) == ('{"a": "yes"}', 1, pytest.approx(1.1))
    server = serve_endpoint(lambda _: reply({"content": "", field: 'It may be {"a": "yes"}'}))
    assert isinstance(ask(server, tmp_path, schema)[0], ChatError)


def test_a_server_that_tells_no_usage_is_named(
    serve_endpoint: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve_endpoint(lambda _: Reply({"choices": [{"message": {"content": "a cat"}}]}))
    said, account = ask(server, tmp_path)
    assert (said.text, account.spent) == ("a cat", 0)
    assert "judge.endpoint reports no usage" in caplog.text


def test_an_object_in_a_thought_alone_is_repaired(serve_endpoint: Serve, tmp_path: Path) -> None:
    schema = object_schema({"a": {"enum": ["yes", "no"]}})
    texts = iter(['<think>{"a": "no"}</think> Hm.', '<think>{"a": "no"}</think>{"a": "yes"}'])
    server = serve_endpoint(lambda _: reply({"content": next(texts)}))
    said, account = ask(server, tmp_path, schema)
    assert (said.text, len(server.requests), account.spent) == ('{"a": "yes"}', 2, pytest.approx(2.2))
