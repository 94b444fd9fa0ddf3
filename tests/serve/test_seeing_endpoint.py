"""A policy that sees, served: a tiny Idefics3 on vLLM, as a client of OpenAI's sends it pictures."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pictures import part, picture, uri
from PIL import Image
from services import Reply, Server, chat_reply
from test_playground import browser as browser
from test_playground import opened, until
from tiny_endpoint import SETTINGS

from vpo_ray.cli import main
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.image_files import data_uri, decode_image, image_name
from vpo_ray.prompts.image_places import image_lines
from vpo_ray.prompts.policy_prompt import chat_ids, control_tokens, prompt_ids, read_prompt
from vpo_ray.recipe import Serve
from vpo_ray.records import PAIR
from vpo_ray.storage.tables import Table
from vpo_ray.world.tiny import make_vlm

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

Outside = Callable[[Callable[[str, dict[str, Any]], Reply]], Server]
RED, BLUE, WHITE = (picture(colour) for colour in ("red", "blue", "white"))
BRIEF = Serve.model_validate({**SETTINGS.model_dump(), "max_tokens": 24})


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that sees, with the task prompt in its chat template."""
    folder = str(tmp_path_factory.mktemp("eyes"))
    make_vlm(folder)
    load_tokenizer(folder, read_prompt("builtin:policy")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(url: str, eyes: str) -> Iterator[str]:
    """What `vpo serve` deploys, beside the endpoint of the other tests."""
    from ray import serve

    from vpo_ray.serve.app import build_app

    serve.run(build_app(eyes, BRIEF), name="eyes", route_prefix="/eyes")
    yield url.replace("/v1", "/eyes/v1")
    serve.delete("eyes")


def chat(where: str, words: str, *images: bytes | str, **more: Any) -> Any:
    client = openai.OpenAI(base_url=where, api_key="none", max_retries=0, timeout=60)
    parts = [part(image if isinstance(image, str) else uri(image)) for image in images]
    content: Any = [*parts, {"type": "text", "text": words}]
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="vpo", messages=messages, **{"temperature": 0, **more})


def optimize(where: str, **body: Any) -> Any:
    return httpx.post(f"{where}/optimize", json={"temperature": 0, **body}, timeout=60)


def transparent() -> bytes:
    """A red picture in a palette, all of it transparent."""
    image, file = Image.new("P", (120, 90), 0), io.BytesIO()
    image.putpalette([255, 0, 0])
    image.save(file, "PNG", transparency=0)
    return file.getvalue()


def test_the_policy_is_shown_what_sampling_shows_it(seeing: str, eyes: str) -> None:
    from transformers import AutoProcessor

    tokenizer = load_tokenizer(eyes)
    words = "a cat <image> on a roof"  # a user cannot give an image in words
    plain, red, blue = chat(seeing, words), chat(seeing, words, RED), chat(seeing, words, BLUE)
    assert plain.usage.prompt_tokens == len(prompt_ids(tokenizer, words))
    shown = tokenizer.decode(
        chat_ids(tokenizer, [{"role": "user", "content": words}], image_lines("<image>"))
    )
    processor = AutoProcessor.from_pretrained(eyes)
    whole = processor(text=[shown], images=[[decode_image(RED)]], add_special_tokens=False)["input_ids"][0]
    assert red.usage.prompt_tokens == blue.usage.prompt_tokens == len(whole) > plain.usage.prompt_tokens + 20
    answers = {reply.choices[0].message.content for reply in (plain, red, blue)}
    assert len(answers) == 3, "the image changes the answer"
    white, clear = (chat(seeing, words, data).choices[0].message.content for data in (WHITE, transparent()))
    assert white == clear != red.choices[0].message.content, "what is transparent becomes white"


def test_a_stream_and_optimize_see_the_same(seeing: str) -> None:
    whole = chat(seeing, "a cat", RED).choices[0].message.content
    parts = chat(seeing, "a cat", RED, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    found = optimize(seeing, query="a cat", image=uri(RED)).json()
    assert found["prompt"] == whole.strip()
    other = optimize(seeing, query="a cat").json()
    assert found["usage"]["prompt_tokens"] > other["usage"]["prompt_tokens"] + 20
    several = optimize(seeing, queries=["a cat", "a cat"], images=[uri(RED), None]).json()["data"]
    assert [one["prompt"] for one in several] == [found["prompt"], other["prompt"]]
    events = optimize(seeing, query="a cat", image=uri(RED), stream=True).text
    assert f'"prompt_tokens": {found["usage"]["prompt_tokens"]}' in events


def test_what_is_not_taken_is_an_error_that_a_client_knows(seeing: str, url: str) -> None:
    content = [part("http://127.0.0.1:9/cat.png"), {"type": "text", "text": "a cat"}]
    body = {"model": "vpo", "messages": [{"role": "user", "content": content}]}
    refused = httpx.post(f"{seeing}/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image_url")
    with pytest.raises(openai.BadRequestError, match="2 images"):
        chat(seeing, "a cat", RED, BLUE)
    with pytest.raises(openai.BadRequestError, match="no PNG, JPEG or WebP"):
        chat(seeing, "a cat", data_uri("cut.png", RED[:-60]))
    # The same words with no image still answer, and a policy that reads takes none.
    assert chat(seeing, "a cat").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="sees no images"):
        chat(url, "a cat", RED)


def test_the_judge_ranks_and_the_gate_looks_at_the_picture(seeing: str, eyes: str, outside: Outside) -> None:
    from ray import serve

    from vpo_ray.serve.app import ingress_app

    def judge(path: str, request: dict[str, Any]) -> Reply:
        content = request["messages"][0]["content"]
        shown = content[0]["image_url"]["url"] if isinstance(content, list) else None
        if "score" in request["response_format"]["json_schema"]["schema"]["properties"]:
            return chat_reply({"critique": "seen" if shown else "unseen", "score": 5})
        return chat_reply({"reason": "it is blue", "unsafe": shown == uri(BLUE)})

    service = outside(judge).service().model_dump()
    guards = {"safety": {"query": "refuse", "judge": service}, "best_of": {"n": 2, "judge": service}}
    settings = Serve.model_validate({**BRIEF.model_dump(), "images": "show", **guards})
    engine = serve.get_deployment_handle("PolicyServer:vpo", "eyes")
    control = control_tokens(load_tokenizer(eyes))
    serve.run(ingress_app(engine, None, settings, control), name="watched", route_prefix="/watched")
    where = seeing.replace("/eyes", "/watched")
    found = optimize(where, query="a cat", image=uri(RED), temperature=1).json()
    assert [rank["reason"] for rank in found["ranking"]] == ["seen"] * 2
    unseen = optimize(where, query="a cat", temperature=1).json()
    assert {rank["reason"] for rank in unseen["ranking"]} == {"unseen"}
    refused = optimize(where, query="a cat", image=uri(BLUE)).json()
    assert (refused["prompt"], refused["safety"]["outcome"]) == (None, "refused")
    assert refused["safety"]["reason"] == "query: judged unsafe: it is blue"
    with pytest.raises(openai.BadRequestError, match="it is blue"):
        chat(where, "a cat", BLUE)
    serve.delete("watched")


def test_what_is_said_of_pictures_becomes_data_and_is_forgotten(
    seeing: str, eyes: str, tmp_path: Path
) -> None:
    from ray import serve

    from vpo_ray.serve.app import ingress_app

    store, live = tmp_path / "store", tmp_path / "live"
    kept = {"store": str(store), "images": True, "anyone": True}
    settings = Serve.model_validate({**BRIEF.model_dump(), "images": "show", "feedback": kept})
    engine = serve.get_deployment_handle("PolicyServer:vpo", "eyes")
    control = control_tokens(load_tokenizer(eyes))
    serve.run(ingress_app(engine, None, settings, control), name="kept", route_prefix="/kept")
    where = seeing.replace("/eyes", "/kept")
    ids = {}
    for data in (RED, BLUE):
        ids[data] = optimize(where, query="it drifts", image=uri(data)).json()["id"]
        said = {"id": ids[data], "edited": "It drifts, slowly."}
        assert httpx.post(f"{where}/feedback", json=said).status_code == 204
    assert optimize(where, query="it drifts", image=uri(RED)[:-40]).status_code == 400
    forged = httpx.post(f"{where}/feedback", json={"id": ids[RED][:-1] + "x", "rating": "up"})
    assert forged.status_code == 404
    serve.delete("kept")  # it writes what waits
    assert main(["collect", str(store), "--to", str(live)]) == 0
    names = {image_name(data) for data in (RED, BLUE)}
    assert {path.name for path in (live / "images").iterdir()} == names
    pairs = list(Table(str(live / "pairs"), PAIR, "pair_id").rows())
    assert {(row["chosen"], row["image"]) for row in pairs} == {
        ("It drifts, slowly.", name) for name in names
    }
    assert main(["forget", str(store), "--answer", ids[RED], "--collected", str(live)]) == 0
    for folder in (store, live):
        assert [path.read_bytes() for path in (folder / "images").iterdir()] == [BLUE]


def test_a_picture_is_chosen_on_the_page(seeing: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    page, problems = opened(browser, seeing.removesuffix("/v1") + "/", 390)
    page.locator("#image").set_input_files(tmp_path / "red.png")
    page.locator("#query").fill("a cat")
    page.locator("#query").press("Control+Enter")
    until(lambda: page.locator("#actions").is_visible())
    assert "with red.png" in page.locator("#facts").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert problems == []
    page.close()
