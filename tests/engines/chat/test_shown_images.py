"""LLMs that are shown the images of queries, by OpenAI's image parts, and what a prompt's tokens are then."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpo_ray.engines.chat import Answer, Sampling
from vpo_ray.engines.chat.images import TOLD, ShownImages
from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.engines.chat.vllm_chat import _without_images
from vpo_ray.files.folder import StorageError
from vpo_ray.files.image_files import data_uri
from vpo_ray.prompts.policy_prompt import chat_ids, prompt_ids
from vpo_ray.storage.images import ImageStore

SAMPLING = Sampling(0.0, 8, 1)


class Heard:
    """An engine that keeps what it is asked."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def complete(self, messages: Any, sampling: Sampling, schema: Any = None) -> Answer:
        self.messages = list(messages)
        return Answer("fine", "stop", 1, 1)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ImageStore, str, bytes]:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "PNG")
    store = ImageStore(tmp_path / "images")
    return store, store.put(file.getvalue()), file.getvalue()


def test_the_users_message_shows_the_image(stored: tuple[ImageStore, str, bytes]) -> None:
    store, name, data = stored
    heard = Heard()
    chat = ShownImages(store.folder.uri).beside(heard, name)
    asked = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "a cat"}]
    answer = asyncio.run(chat.complete(asked, SAMPLING))
    assert answer.text == "fine"
    image = {"type": "image_url", "image_url": {"url": data_uri(name, data)}}
    texts = [{"type": "text", "text": TOLD}, {"type": "text", "text": "a cat"}]
    assert heard.messages == [asked[0], {"role": "user", "content": [image, *texts]}]
    assert asked[1]["content"] == "a cat", "the stage's own messages are left as they are"
    texts_alone, pictures = _without_images(heard.messages)
    assert texts_alone[1]["content"] == f"{TOLD}\n\na cat"
    assert [picture.size for picture in pictures] == [(6, 4)]


def test_an_image_that_is_gone_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read the image"):
        ShownImages(str(tmp_path)).beside(Heard(), f"{'0' * 64}.png")


def test_the_image_stands_before_the_query_in_the_task_prompt(tiny_models: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_models / "policy"), "Rewrite this: {query}. Be brief.")
    asked = [{"role": "user", "content": "a <place> cat"}]
    text = tokenizer.decode(chat_ids(tokenizer, asked, "<place>\n"))
    assert "Rewrite this: <place>\na <place> cat. Be brief." in text
    assert chat_ids(tokenizer, asked) == prompt_ids(tokenizer, "a <place> cat")
