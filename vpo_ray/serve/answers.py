"""Wire formats of an answer: chat completions, their chunks, server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from vpo_ray.serve.optimize_schema import Optimization

DONE = "data: [DONE]\n\n"


def event(name: str, data: Any) -> str:
    """A named server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def chunks_in(part: str) -> Iterator[dict[str, Any]]:
    """The chunks, errors included, in a piece of a chat completion's stream."""
    for line in part.split("\n"):
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def usage_in(part: str) -> dict[str, Any] | None:
    """The usage in a piece of a stream, or None; most have none."""
    if '"usage":{' not in part:
        return None
    return next((chunk["usage"] for chunk in chunks_in(part) if chunk.get("usage")), None)


def without_usage(part: str) -> str:
    """A piece of a stream without the chunk that is the usage alone."""
    events = part.split("\n\n")
    return "\n\n".join(e for e in events if all(c.get("choices") or not c.get("usage") for c in chunks_in(e)))


def texts_of(answer: dict[str, Any]) -> list[str]:
    """The texts of a chat completion, without the space around them."""
    return [(choice["message"].get("content") or "").strip() for choice in answer["choices"]]


def is_cut(choice: dict[str, Any]) -> bool:
    """Whether a choice ended at `max_tokens`."""
    return choice.get("finish_reason") == "length"


def delta_texts(part: str) -> Iterator[str]:
    """The texts in a piece of a stream."""
    for chunk in chunks_in(part):
        for choice in chunk.get("choices", []):
            if text := choice["delta"].get("content"):
                yield text


def completion(result: Optimization, request_id: str) -> dict[str, Any]:
    """A chat completion with the content of `/v1/optimize`; what OpenAI has no field for is in `vpo`."""
    texts = [result.prompt or "", *result.alternatives]
    usage = result.usage.model_dump()
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model,
        "system_fingerprint": result.system_fingerprint,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if result.cut else "stop",
            }
            for index, text in enumerate(texts)
        ],
        "usage": {**usage, "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]},
        "vpo": result.model_dump(include={"id", "safety", "fallback", "ranking", "latency"}),
    }


async def completion_events(whole: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """A finished completion as a stream, for clients that asked for one."""
    frame = {key: whole[key] for key in ("id", "created", "model", "system_fingerprint")}
    frame["object"] = "chat.completion.chunk"
    for choice in whole["choices"]:
        said = {"role": "assistant", "content": choice["message"]["content"]}
        for delta, reason in ((said, None), ({}, choice["finish_reason"])):
            part = {"index": choice["index"], "delta": delta, "logprobs": None, "finish_reason": reason}
            yield f"data: {json.dumps({**frame, 'choices': [part]})}\n\n"
    last = {**frame, "choices": [], "vpo": whole["vpo"]}
    yield f"data: {json.dumps({**last, 'usage': whole['usage']} if with_usage else last)}\n\n"
    yield DONE
