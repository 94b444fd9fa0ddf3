"""`chat_template_kwargs` of policy and judge: what they are part of, and what is no argument."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import completion

from vpo_ray.engines.chat import Sampling
from vpo_ray.engines.chat.openai_chat import Answers, OpenAIChat
from vpo_ray.engines.endpoint.account import Account
from vpo_ray.engines.endpoint.client import EndpointClient
from vpo_ray.loop.policies import policy_id
from vpo_ray.recipe import ChatModel, Draft, Endpoint, Judge, RecipeError, load
from vpo_ray.stages.draft import draft_key
from vpo_ray.storage.run_dir import RunDir

TINY = Path(__file__).parents[2] / "jobs" / "recipes" / "tiny.yaml"
OFF = "chat_template_kwargs={enable_thinking: false}"


@pytest.mark.parametrize("section", ["policy", "judge"])
def test_they_are_part_of_what_is_computed(section: str, tmp_path: Path) -> None:
    plain, off = load(TINY), load(TINY, [f"{section}.{OFF}"])
    assert plain.fingerprint() != off.fingerprint()
    assert load(TINY, [f"{section}.chat_template_kwargs={{}}"]).fingerprint() == plain.fingerprint()
    run = RunDir(str(tmp_path))
    ids = [policy_id(recipe.model_copy(update={"sft": None}), run) for recipe in (plain, off)]
    assert (ids[0] == ids[1]) is (section == "judge")


def test_drafts_are_others_with_them() -> None:
    def key(**more: Any) -> str:
        return draft_key(Draft(examples="x"), Judge(model="m", **more), [])

    assert key() == key(chat_template_kwargs={}) != key(chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "not-a-name", "a b"])
def test_what_is_no_argument_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="no argument that a chat template"):
        load(TINY, [f"judge.chat_template_kwargs={{{name}: 1}}"])


def test_an_endpoint_is_sent_them_and_its_answers_are_others(serve_endpoint: Any, tmp_path: Path) -> None:
    server = serve_endpoint(lambda _: completion("a cat"))
    endpoint = Endpoint(base_url=server.url, api_key_env=None)

    def ask(arguments: dict[str, Any]) -> str:
        model = ChatModel(model="m", backend="openai", endpoint=endpoint, chat_template_kwargs=arguments)
        client = EndpointClient(endpoint, "m", "judge.endpoint")
        chat = OpenAIChat(model, client, Answers(str(tmp_path), "one"), Account())

        async def once() -> str:
            async with client:
                messages = [{"role": "user", "content": "what?"}]
                return (await chat.complete(messages, Sampling(temperature=0, max_tokens=9, seed=1))).text

        return asyncio.run(once())

    for arguments in ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert ask(arguments) == "a cat"
    assert [request.get("chat_template_kwargs") for request in server.requests] == [
        None,
        {"enable_thinking": False},
        {"enable_thinking": True},
    ]
