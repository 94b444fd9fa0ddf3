"""Keys, limits, the safety gate, ranking and fallback, through the real ingress and engine."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from services import Reply, Server, chat_reply

from vpo_ray.serve.keys import make_key

pytestmark = [pytest.mark.ray, pytest.mark.engine]

Outside = Callable[[Callable[[str, dict[str, Any]], Reply]], Server]


def post(url: str, body: dict[str, Any], key: str | None = None, route: str = "optimize") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/{route}", json=body, headers=headers, timeout=60)


def chat(query: str, **more: Any) -> dict[str, Any]:
    return {"model": "vpo", "messages": [{"role": "user", "content": query}], "max_tokens": 5, **more}


def safety_judge(path: str, request: dict[str, Any]) -> Reply:
    """Flags what names a knife, and ranks by length; fails where a text asks for it."""
    text = request["messages"][0]["content"]
    if "score" in request["response_format"]["json_schema"]["schema"]["properties"]:
        return chat_reply({"critique": f"{len(text)} characters", "score": len(text) % 11})
    if "failing judge" in text:
        return 500, {}
    return chat_reply({"reason": "a knife", "unsafe": "knife" in text})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys by name, and their file."""
    made = {name: make_key(name) for name in ("web", "slow", "narrow", "single")}
    options = {"slow": "requests_per_minute=6", "narrow": "scopes=videos", "single": "concurrency=1"}
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("\n".join(f"{line} {options.get(name, '')}" for name, (_, line) in made.items()), "utf-8")
    return {**{name: key for name, (key, _) in made.items()}, "file": str(path)}


@pytest.fixture(scope="module")
def guarded(endpoint: Callable[..., str], outside: Outside, keys: dict[str, str]) -> str:
    judge = outside(safety_judge).service()
    safety = {"query": "rewrite", "prompt": True, "judge": judge}
    best_of = {"n": 3, "judge": judge}
    return endpoint("guarded", keys=keys["file"], safety=safety, best_of=best_of, max_tokens=12)


def test_who_may_not_call_is_told_why(guarded: str, keys: dict[str, str]) -> None:
    body = {"query": "a cat"}
    for route, sent in (("optimize", body), ("chat/completions", chat("a cat")), ("videos", body)):
        assert post(guarded, sent, route=route).json()["error"]["code"] == "missing_api_key"
        assert post(guarded, sent, "vpo-wrong", route).json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{guarded}/models").status_code == 401
    refused = post(guarded, body, keys["narrow"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")
    replies = [post(guarded, body, keys["slow"]) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert 20 <= int(replies[2].headers["Retry-After"]) <= 30, "each is three prompts, one comes in 10 s"
    many = post(guarded, {"queries": ["a cat"] * 3}, keys["slow"])
    assert (many.status_code, many.json()["error"]["code"]) == (413, "request_too_large")
    with ThreadPoolExecutor(4) as pool:
        codes = [r.status_code for r in pool.map(lambda _: post(guarded, body, keys["single"]), range(4))]
    assert set(codes) == {200, 429}
    assert post(guarded, body, keys["single"]).status_code == 200, "its place was given back"


def test_the_openai_client_carries_the_key(guarded: str, keys: dict[str, str]) -> None:
    messages: Any = [{"role": "user", "content": "a cat"}]
    client = openai.OpenAI(base_url=guarded, api_key=keys["web"], max_retries=0)
    assert client.chat.completions.create(model="vpo", messages=messages).choices[0].message.content
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="vpo-wrong").chat.completions.create(model="vpo", messages=messages)


def test_the_gate_tells_its_outcome(guarded: str, keys: dict[str, str]) -> None:
    passed = post(guarded, {"query": "a cat"}, keys["web"]).json()
    assert passed["safety"] == {"outcome": "pass", "reason": None, "checked": ["query", "prompt"]}
    # The query is flagged, and what the policy made of it is not.
    rewritten = post(guarded, {"query": "a knife"}, keys["web"]).json()
    assert rewritten["safety"]["outcome"] == "rewritten"
    assert rewritten["safety"]["reason"] == "query: judged unsafe: a knife"
    assert rewritten["prompt"]
    assert "knife" not in rewritten["prompt"]
    closed = post(guarded, {"query": "a failing judge"}, keys["web"]).json()
    assert (closed["prompt"], closed["safety"]["outcome"]) == (None, "refused")
    reply = post(guarded, chat("a failing judge"), keys["web"], "chat/completions")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "safety_unavailable")


def test_candidates_are_ranked_and_the_best_comes_first(guarded: str, keys: dict[str, str]) -> None:
    found = post(guarded, {"query": "a cat", "n": 2, "temperature": 1.5, "seed": 1}, keys["web"]).json()
    scores = [rank["score"] for rank in found["ranking"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert [rank["prompt"] for rank in found["ranking"]][:2] == [found["prompt"], *found["alternatives"]]
    assert all("characters" in rank["reason"] for rank in found["ranking"])
    # The chat API gives the same best one, whole or streamed.
    asked = chat("a cat", temperature=1.5, seed=1, max_tokens=12, n=2)
    whole = post(guarded, asked, keys["web"], "chat/completions").json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts == [found["prompt"], *found["alternatives"]]
    client = openai.OpenAI(base_url=guarded, api_key=keys["web"])
    asked["stream_options"] = {"include_usage": True}
    streamed = ["", ""]
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert part.usage.completion_tokens == whole["usage"]["completion_tokens"]


# Far less than the engine needs.
SLOW = {"timeout_s": 0.02, "max_tokens": 1700}


def test_the_gate_and_the_fallback_where_the_engines_answer_is_passed_on(
    endpoint: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "words").write_text("knife\n", "utf-8")
    safety = {"query": "refuse", "keywords": str(tmp_path / "words")}
    where = endpoint("plain", **SLOW, safety=safety, fallback=True)
    found = post(where, {"query": "a Knife"}).json()
    assert (found["prompt"], found["safety"]["outcome"]) == (None, "refused")
    assert found["safety"]["reason"] == "query: keyword 'knife'"
    flag = post(where, {"query": "a cat --neg blur, knife"}).json()
    assert flag["flags"] == [{"name": "neg", "value": "blur, knife"}]
    assert flag["safety"]["outcome"] == "refused", "flags reach the video model too"
    reply = post(where, chat("a knife"), route="chat/completions")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "content_filter")
    late = chat("a cat", temperature=0, max_tokens=1700)
    whole = post(where, late, route="chat/completions").json()
    assert whole["choices"][0]["message"]["content"] == "a cat"
    assert whole["vpo"]["fallback"] is True
    streamed = post(where, late | {"stream": True}, route="chat/completions").text
    assert '"content": "a cat"' in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    body = {"query": "a cat", "temperature": 0, "stream": True}
    found = json.loads(post(where, body).text.split("data: ")[-1])
    assert (found["prompt"], found["fallback"]) == ("a cat", True)


def test_an_empty_answer_is_replaced_by_the_query(endpoint: Callable[..., str]) -> None:
    where = endpoint("filled", fallback=True)
    asked = chat("a cat", temperature=0)
    written = post(where, asked, route="chat/completions").json()
    assert "fallback" not in written.get("vpo", {})
    # What is before the stop text is the answer, and nothing is before its first character.
    empty = asked | {"stop": [written["choices"][0]["message"]["content"][0]]}
    whole = post(where, empty, route="chat/completions").json()
    assert (whole["choices"][0]["message"]["content"], whole["vpo"]["fallback"]) == ("a cat", True)
    assert '"content": "a cat"' in post(where, empty | {"stream": True}, route="chat/completions").text
    streamed = post(where, asked | {"stream": True}, route="chat/completions").text
    assert "a cat" not in streamed
    assert streamed.endswith("data: [DONE]\n\n")


def test_what_comes_back_raw_is_checked_as_a_prompt_is(endpoint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "words").write_text("knife\n", "utf-8")
    safety = {"prompt": True, "keywords": str(tmp_path / "words")}
    where = endpoint("late", **SLOW, fallback=True, safety=safety)
    found = post(where, {"query": "a cat", "temperature": 0}).json()
    assert (found["prompt"], found["fallback"], found["changed"]) == ("a cat", True, False)
    assert post(where, {"query": "a knife", "temperature": 0}).json()["safety"]["outcome"] == "refused"


def test_without_a_fallback_a_late_answer_is_an_error_and_the_engine_is_free_again(
    endpoint: Callable[..., str], brief: str
) -> None:
    where = endpoint("hasty", **SLOW, playground=False)
    reply = post(where, {"query": "a cat", "temperature": 0})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert httpx.get(where.replace("/v1", "/")).status_code == 404
    late = chat("a cat", temperature=0, max_tokens=1700)
    waits = []
    for _ in range(16):  # other work comes and goes: one quick answer shows it
        reply = post(where, late, route="chat/completions")
        assert (reply.status_code, "Retry-After" in reply.headers) == (504, True)
        began = time.monotonic()
        assert post(brief, {"query": "a cat"}).status_code == 200
        waits.append(time.monotonic() - began)
        if waits[-1] < 3:  # one long answer alone takes longer
            return
    pytest.fail(f"the next answers took {waits} s")


def test_a_browser_of_another_site_is_answered_only_where_the_recipe_says(url: str, brief: str) -> None:
    headers = {"Origin": "https://studio.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{url}/models", headers=headers).headers
    reply = httpx.options(f"{brief}/optimize", headers=headers)
    assert reply.headers["access-control-allow-origin"] == "https://studio.example"
    other = {**headers, "Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in httpx.options(f"{brief}/optimize", headers=other).headers


def log_lines(name: str) -> str:
    """What Serve's replicas of a deployment wrote, in the session's folder."""
    import ray

    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    return "\n".join(file.read_text("utf-8") for file in folder.glob(f"*{name}*") if file.is_file())


def test_logs_name_the_request_and_not_its_secrets(guarded: str, keys: dict[str, str]) -> None:
    secret, identity = "a zebra in slippers", "trace-me-12345"
    headers = {"Authorization": f"Bearer {keys['web']}", "X-Request-ID": identity}
    for body in ({"query": secret}, {"query": secret, "n": "x"}, {"query": f"{secret} failing judge"}):
        reply = httpx.post(f"{guarded}/optimize", json=body, headers=headers, timeout=60)
        assert reply.headers["X-Request-ID"] == identity
    prompt = post(guarded, {"query": secret, "temperature": 0}, keys["web"]).json()["prompt"]
    time.sleep(0.5)
    everything = log_lines("")
    assert identity in log_lines("PolicyServer"), "the engine's log has the request's id"
    for told in (secret, keys["web"], "Authorization", prompt[:30], json.dumps(prompt)[1:30]):
        assert told not in everything
