"""The policy's answers without the thoughts of a model that thinks aloud, whole or as a stream.

The engine's replica knows its checkpoint, so it restores the mark of a thought that the chat template opened.
The engine's caller removes the thoughts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vpo_ray.prompts.thoughts import Spoken, UnclosedThought, without_thoughts
from vpo_ray.serve.answers import DONE, chunks_in


def marked(part: str, mark: str, begun: set[int]) -> str:
    """A completion, or a piece of its stream, with a mark before the text of every choice.

    Args:
        begun: the choices that have it already.
    """
    if not part.startswith("data: "):
        whole = json.loads(part)
        for choice in whole.get("choices", []):
            choice["message"]["content"] = mark + (choice["message"].get("content") or "")
        return json.dumps(whole)

    def put(choice: dict[str, Any]) -> bool:
        text = (choice.get("delta") or {}).get("content")
        if not text or choice["index"] in begun:
            return False
        begun.add(choice["index"])
        choice["delta"]["content"] = mark + text
        return True

    return _rewritten(part, put)


def spoken(completion: dict[str, Any]) -> dict[str, Any]:
    """A completion without thoughts; a choice that ends within one is left out.

    Raises:
        UnclosedThought: all do.
    """
    kept, failed = [], None
    for choice in completion.get("choices", []):
        message = choice["message"]
        try:
            kept.append({**choice, "message": {**message, "content": _without(message.get("content"))}})
        except UnclosedThought as error:
            failed = error
    if failed is not None and not kept:
        raise failed
    return {**completion, "choices": kept}


class SpokenParts:
    """Removes the thoughts from a stream. Everything before the first words of the answer is held back until
    they arrive, so that an answer without any can still be replaced."""

    def __init__(self) -> None:
        self._voices: defaultdict[int, Spoken] = defaultdict(Spoken)
        self._held = ""
        self._begun = False

    def feed(self, part: str) -> str:
        """What can be sent now. Raises UnclosedThought where an answer ends within a thought."""
        self._held += _rewritten(part, self._take)
        if not (self._begun or '"error"' in part or "[DONE]" in part):
            return ""
        ready, self._held = self._held, ""
        return ready

    def _take(self, choice: dict[str, Any]) -> bool:
        delta = choice.get("delta") or {}
        text, voice = delta.get("content") or "", self._voices[choice["index"]]
        said = voice.feed(text)
        if choice.get("finish_reason") is not None:
            said += voice.end()
        self._begun = self._begun or bool(said)
        if said == text:
            return False
        choice["delta"] = {**delta, "content": said}
        return True


def _without(text: str | None) -> str | None:
    return text and without_thoughts(text)


def _rewritten(part: str, change: Callable[[dict[str, Any]], bool]) -> str:
    """A piece of a stream with its choices changed; the same text if nothing changed."""
    chunks = list(chunks_in(part))
    changed = [change(choice) for chunk in chunks for choice in chunk.get("choices", [])]
    if not any(changed):
        return part
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + (DONE if "[DONE]" in part else "")
