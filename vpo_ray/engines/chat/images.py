"""The image of a row's query in the questions about it, as OpenAI's image parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vpo_ray.engines.chat import Answer, Chat, Message, Sampling
from vpo_ray.files.image_files import data_uri
from vpo_ray.storage.images import ImageStore

# Said to LLMs beside the policy, whose prompts tell of a text alone.
TOLD = "The user gave the image above with the query: the video begins with it."


@dataclass(frozen=True)
class ShownImages:
    """The images that a model is shown. Picklable.

    Args:
        uri: of their store.
        told: what is said of an image, "" for nothing.
    """

    uri: str
    told: str = TOLD

    def beside(self, chat: Chat, name: str) -> Chat:
        """A chat whose questions show an image. Raises StorageError where it is not there."""
        data = ImageStore(self.uri).read(name)
        part = {"type": "image_url", "image_url": {"url": data_uri(name, data)}}
        return _Showing(chat, [part, *([{"type": "text", "text": self.told}] if self.told else [])])


class _Showing:
    def __init__(self, chat: Chat, parts: Sequence[Message]) -> None:
        self.chat, self.parts = chat, list(parts)

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        shown = list(messages)
        for place, message in enumerate(shown):
            if message["role"] == "user" and isinstance(message["content"], str):
                content = [*self.parts, {"type": "text", "text": message["content"]}]
                shown[place] = {**message, "content": content}
                break
        return await self.chat.complete(shown, sampling, schema)
