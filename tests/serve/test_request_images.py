"""Images of requests: which are taken, what is said of others, and who is shown them. No engine is needed."""

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import huge_claim, part, picture, uri
from services import Reply, Server, chat_reply
from starlette.requests import Request
from test_costs import Alone, Engine

from vpo_ray.files.image_files import MAX_BYTES, image_name
from vpo_ray.recipe import RecipeError, Serve, load, serve_of
from vpo_ray.recipe.serve import BestOf, Safety
from vpo_ray.serve.app import as_seen
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.images import (
    AttachedImage,
    GivenImage,
    films_images,
    image_room,
    read_image,
    takes_images,
)
from vpo_ray.serve.optimize_schema import parse_optimize
from vpo_ray.serve.policy import takes_canary
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.request import max_body_bytes, parse_request
from vpo_ray.serve.safety import Gate

SEES, BLIND = Serve(images="show"), Serve()
RED, BLUE = picture("red"), picture("blue", form="JPEG")
Outside = Callable[[Callable[[str, dict[str, Any]], Reply]], Server]


def user(*parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return {"role": "user", "content": texts}


def chat(*messages: dict[str, Any]) -> bytes:
    return json.dumps({"model": "vpo", "messages": list(messages)}).encode()


def ask(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_an_image_part_comes_with_the_words_of_its_message() -> None:
    query, _, image = parse_request(chat(user(part(uri(RED)), "Die Laterne schwebt fort — 灯笼 🏮")), SEES)
    assert query == "Die Laterne schwebt fort — 灯笼 🏮"
    assert image is not None
    given = read_image(image)
    assert (given.name, given.data) == (image_name(RED), RED)
    assert parse_request(chat(user("a cat")), SEES)[2] is None


def test_a_conversation_has_the_image_of_any_user_message_or_of_the_last() -> None:
    messages = user(part(uri(RED)), "a cat"), {"role": "assistant", "content": "A cat."}, user("at night")
    query, _, image = parse_request(chat(*messages), SEES)
    assert query == "a cat\nEdit: at night"
    assert image is not None
    assert image.param == "messages.0.content.0"
    last = SEES.model_copy(update={"history": "last"})
    assert parse_request(chat(*messages), last)[2] is None
    again = parse_request(chat(messages[0], user("at night", part(uri(BLUE)))), last)[2]
    assert again is not None
    assert again.text == uri(BLUE)


@pytest.mark.parametrize(
    ("message", "status", "code", "says"),
    [
        (user("a", part("https://example.com/cat.png")), 400, "invalid_image_url", "nothing is fetched"),
        (user("a", part("file:///etc/passwd")), 400, "invalid_image_url", "nothing is fetched"),
        (user("a", part("cat.png")), 400, "invalid_image_url", "send the image itself"),
        (user("a", part(uri(RED)), part(uri(BLUE))), 400, "too_many_images", "2 images, a query has one"),
        (user(part(uri(RED))), 400, "empty_query", "the query is empty"),
        (user("a", {"type": "image_url", "image_url": uri(RED)}), 400, None, "content.1.image_url: "),
        (user("a", {"type": "image_url"}), 400, None, "messages.0.content.1.image_url: Field required"),
        (user("a", {"type": "input_audio"}), 400, None, "content.1: a part of a message has the type"),
        (user("a", {"type": ["text"]}), 400, None, "content.1: a part of a message has the type"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_image_of_a_chat_is_told(
    message: dict[str, Any], status: int, code: str | None, says: str
) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(chat(message), SEES)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert says in refused.value.message


def test_only_a_users_message_has_an_image() -> None:
    for role in ("system", "assistant"):
        with pytest.raises(ApiError, match="role `user`"):
            parse_request(chat({**user("a", part(uri(RED))), "role": role}, user("a cat")), SEES)


@pytest.mark.parametrize(
    ("text", "status", "code", "says"),
    [
        ("http://169.254.169.254/latest", 400, "invalid_image_url", "nothing is fetched"),
        ("S3://bucket/cat.png", 400, "invalid_image_url", "nothing is fetched"),
        ("data:image/png;base64,***", 400, "invalid_image", "no base64"),
        ("data:image/png;base64,é", 400, "invalid_image", "no base64"),
        ("data:image/png;base64,\ud800", 400, "invalid_image", "no base64"),
        ("not base64", 400, "invalid_image", "no base64"),
        ("data:image/svg+xml;base64,AAAA", 400, "invalid_image", "image/png, image/jpeg or image/webp"),
        ("data:image/png,AAAA", 400, "invalid_image", "in base64"),
        (base64.b64encode(b"GIF89a").decode(), 400, "invalid_image", "no PNG, JPEG or WebP"),
        (base64.b64encode(RED[:-60]).decode(), 400, "invalid_image", "no PNG, JPEG or WebP"),
        (base64.b64encode(huge_claim()).decode(), 413, "image_too_large", "at most 50000000 pixels"),
        ("A" * (MAX_BYTES * 4 // 3 + 64), 413, "image_too_large", "at most 32 MiB"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_shown_is_told(text: str, status: int, code: str, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_image(AttachedImage(text, "image"))
    assert (refused.value.status, refused.value.code, refused.value.param) == (status, code, "image")
    assert says in refused.value.message
    assert len(refused.value.message) < 300
    json.dumps(refused.value.body()).encode()


def test_optimize_takes_an_image_of_each_query() -> None:
    single = parse_optimize(ask(query="a cat", image=base64.b64encode(RED).decode()), SEES)
    (only,) = single.images
    assert only is not None
    assert read_image(only).name == image_name(RED)
    asked = parse_optimize(ask(queries=["a", "b"], images=[None, uri(BLUE)]), SEES)
    none, second = asked.images
    assert none is None
    assert second == AttachedImage(uri(BLUE), "images.1")
    assert parse_optimize(ask(queries=["a", "b"]), SEES).images == [None, None]
    assert parse_optimize(ask(query="a", image=None), BLIND).images == [None]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"queries": ["a"], "image": uri(RED)}, "give `images`, one for each"),
        ({"queries": ["a", "b"], "images": [uri(RED)]}, "one for each of `queries`"),
        ({"query": "a", "images": [uri(RED)]}, "one for each of `queries`"),
        ({"query": "a", "image": ""}, "image"),
        ({"query": "a", "image": {"url": uri(RED)}}, "image"),
        ({"query": "a", "image_url": {"url": uri(RED)}}, "give the image itself as `image`"),
    ],
)
def test_a_bad_image_field_is_told(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        parse_optimize(ask(**fields), SEES)
    assert refused.value.status == 422


def test_a_policy_that_reads_refuses_images_and_their_bodies() -> None:
    for settings in (BLIND, Serve(images="ignore")):
        for fields in ({"image": uri(RED)}, {"image_url": {}}):
            with pytest.raises(ApiError, match="sees no images") as refused:
                parse_optimize(ask(query="a", **fields), settings)
            assert (refused.value.status, refused.value.code) == (400, "images_not_supported")
        with pytest.raises(ApiError, match="sees no images"):
            parse_request(chat(user("a", part(uri(RED)))), settings)
        assert image_room(takes_images(settings) or films_images(settings)) == 0
    whole = len(ask(query="a", image="A" * (MAX_BYTES * 4 // 3)))
    assert whole <= max_body_bytes(SEES) + image_room(takes_images(SEES))


# Who is shown images


def test_the_checkpoint_and_the_recipe_say_whether_the_policy_sees(tmp_path: Path) -> None:
    for name, config in (("eyes", {"vision_config": {"depth": 2}}), ("text", {"hidden_size": 4})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", **config}), "utf-8")
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": str(tmp_path / "eyes"), "r": 4}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(base), "utf-8")
    eyes, text, adapter = (str(tmp_path / name) for name in ("eyes", "text", "adapter"))
    assert as_seen(eyes, Serve()).images == "show"
    assert as_seen(adapter, Serve()).images == "show"
    assert as_seen(text, Serve()).images == "ignore"
    assert as_seen(eyes, Serve(images="ignore")).images == "ignore"
    canary: dict[str, Any] = {"canary": {"checkpoint": text, "share": 0.1}}
    assert as_seen(eyes, Serve.model_validate(canary)).images == "ignore"
    with pytest.raises(RecipeError, match="cannot see"):
        as_seen(text, Serve(images="show"))
    base["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(base), "utf-8")
    assert as_seen(adapter, Serve()).images == "ignore"
    assert as_seen(adapter, Serve(images="show")).images == "show", "who serves it knows"
    tiny = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
    assert serve_of(load(tiny)).images is None
    assert serve_of(load(tiny, ["policy.images=ignore"])).images == "ignore"
    assert serve_of(load(tiny, ["policy.images=ignore", "serve.images=show"])).images == "show"


def given(data: bytes) -> GivenImage:
    return GivenImage(image_name(data), data)


@pytest.mark.parametrize("images", ["show", "ignore"])
def test_the_gate_shows_the_image_to_checkers_that_see(outside: Outside, images: Any, tmp_path: Path) -> None:
    asked: list[Any] = []

    def reply(path: str, request: dict[str, Any]) -> Reply:
        asked.append(request["input"] if "input" in request else request["messages"][0]["content"])
        seen = isinstance(asked[-1], list)
        if "input" in request:
            return 200, {"results": [{"flagged": False, "categories": {}}]}
        return chat_reply({"reason": "a knife in the picture", "unsafe": seen})

    service = outside(reply).service().model_copy(update={"images": images})
    (tmp_path / "words").write_text("axe\n", "utf-8")
    words = str(tmp_path / "words")
    gate = Gate(Safety(query="refuse", keywords=words, moderation=service, judge=service))
    verdict = asyncio.run(gate.check("a cat", given(RED)))
    assert verdict.flagged == (images == "show")
    assert not asyncio.run(gate.check("a cat")).flagged
    for content in asked[:2]:
        assert isinstance(content, list) == (images == "show")
    assert all(isinstance(content, str) for content in asked[2:])
    if images == "show":
        assert [one["type"] for one in asked[0]] == ["image_url", "text"]
        assert asked[1][0]["image_url"]["url"] == uri(RED)
        assert "begins with it" in asked[1][1]["text"]


def test_the_ranker_judges_with_the_image(outside: Outside) -> None:
    def reply(path: str, request: dict[str, Any]) -> Reply:
        if path.endswith("/rerank"):
            return 200, {"results": [{"index": n, "relevance_score": n} for n in (0, 1)]}
        return chat_reply(
            {"critique": "so", "score": 9 if isinstance(request["messages"][0]["content"], list) else 1}
        )

    service = outside(reply).service()
    formula: Any = {"terms": {"judge": 1, "rerank": 0.001}}
    ranker = Ranker(BestOf(judge=service, rerank=service, formula=formula))
    shown = asyncio.run(ranker.rank("a cat", ["A cat.", "A tabby."], given(RED)))
    assert shown is not None
    assert [round(rank.score) for rank in shown] == [9, 9]
    plain = asyncio.run(ranker.rank("a cat", ["A cat.", "A tabby."]))
    assert plain is not None
    assert [round(rank.score) for rank in plain] == [1, 1]
    blind = service.model_copy(update={"images": "ignore"})
    with pytest.raises(ValueError, match="images has no effect for rerank"):
        BestOf(rerank=blind)


def test_the_same_words_with_another_image_are_another_query() -> None:
    chosen = [takes_canary("a cat", 0.5, read_image(AttachedImage(uri(picture(size=(n, 9))), "")).digest)
              for n in range(1, 40)]  # fmt: skip
    assert 5 < sum(chosen) < 35


# Through the routes, with an engine that answers at once


def answered(route: str, body: bytes, settings: Serve) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    async def go() -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        engine = Engine()
        ingress = Alone(engine, None, None, settings, ("<image>",))

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        reply = await getattr(ingress, route)(Request(scope, receive))
        return reply.status_code, json.loads(reply.body), engine.bodies

    return asyncio.run(go())


@pytest.mark.parametrize("data", [RED, picture(size=(2000, 2000), colour="#abcdef") + b"x" * 400_000])
def test_the_engine_gets_the_image_and_the_neutral_words(data: bytes) -> None:
    for route, body in (
        ("chat", chat(user("a <image> cat", part(uri(data))))),
        ("optimize", ask(query="a <image> cat", image=uri(data))),
    ):
        status, _, (asked,) = answered(route, body, SEES)
        assert status == 200
        assert asked["image"] == data
        assert asked["messages"] == [{"role": "user", "content": "a < image> cat"}]
    status, told, bodies = answered("optimize", ask(queries=["a", "b"], images=[None, uri(data)]), SEES)
    assert (status, len(told["data"])) == (200, 2)
    assert sorted(body.get("image", b"") for body in bodies) == [b"", data]


def test_the_routes_tell_what_is_wrong_with_an_image() -> None:
    broken = uri(RED)[:-40]
    for route, body in (("chat", chat(user("a", part(broken)))), ("optimize", ask(query="a", image=broken))):
        status, told, bodies = answered(route, body, SEES)
        assert (status, told["error"]["code"], bodies) == (400, "invalid_image", [])
    many = ask(query="a", image="A" * (MAX_BYTES * 2))
    assert answered("optimize", many, SEES)[1]["error"]["code"] == "body_too_large"
    assert answered("optimize", ask(query="a", image=uri(RED)), BLIND)[0] == 400
