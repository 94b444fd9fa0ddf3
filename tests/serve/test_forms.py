"""Requests for a video as OpenAI's own client encodes them."""

import asyncio
import base64
import io
from typing import Any

import httpx
import openai
import pytest

from vpo_ray.recipe import Serve
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.forms import form_as_json
from vpo_ray.serve.video_jobs import parse_video

SETTINGS = Serve.model_validate({"images": "ignore"})


def sent(**fields: Any) -> tuple[bytes, str]:
    """Body and media type of what OpenAI's client sends."""
    requests: list[httpx.Request] = []

    def take(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(202, json={"id": "video_1", "object": "video", "status": "queued"})

    client = openai.OpenAI(
        base_url="http://127.0.0.1:9/v1",
        api_key="none",
        http_client=httpx.Client(transport=httpx.MockTransport(take)),
    )
    assert client.videos.create(**fields).status == "queued"
    (request,) = requests
    return request.read(), request.headers["content-type"]


def asked(body: bytes, kind: str) -> Any:
    return parse_video(asyncio.run(form_as_json(body, kind)), SETTINGS)


@pytest.mark.parametrize("prompt", ["a cat", "uné 猫 🐈\n\r\n--x", "a" * 3000, '"; name="seed"'])
def test_openais_client_asks_for_a_video(prompt: str) -> None:
    body, kind = sent(prompt=prompt, model=SETTINGS.model_name, seconds="4", size="1280x720")
    assert kind.startswith("multipart/form-data")
    assert asked(body, kind) == (prompt, None, 0, None)
    body, kind = sent(prompt=prompt, extra_body={"seed": "7", "query": "a dog"})
    assert asked(body, kind) == ("a dog", prompt, 7, None)


def test_a_picture_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = bytes(range(256)) * 9 + b"\r\n--"
    body, kind = sent(prompt="a cat", input_reference=("cat.png", io.BytesIO(picture), "image/png"))
    monkeypatch.setattr("vpo_ray.serve.video_jobs.check_film", lambda settings, has_image: None)
    image = asked(body, kind).image
    assert base64.b64decode(image.text) == picture


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"{}", "multipart/form-data", "no form"),
        (b"nothing", "multipart/form-data; boundary=x", "no form"),
        (
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "prompt: not UTF-8",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="mask"; filename="m"\r\n\r\nm\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "mask: a file that is not taken",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\nm\r\n' * 40 + b"--x--\r\n",
            "multipart/form-data; boundary=x",
            "Too many fields",
        ),
        (b"--x--\r\n", "multipart/form-data; boundary=x", "give `query`"),
        (
            b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\nmany\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "seed",
        ),
    ],
)
def test_what_is_no_such_form_is_told(body: bytes, kind: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        asked(body, kind)
    assert refused.value.status in (400, 422)
