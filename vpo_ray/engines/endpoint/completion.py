"""Reads chat completions of any server.

An answer was paid for, and is not requested again because it is hard to read. So only what is used is read,
each field by itself, and no content is an error: usage first, then text, refusal, the reason it ended.
OpenAI's form is the common one; content in parts (Mistral), Anthropic's and Gemini's forms, and stream events
are read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vpo_ray.engines.chat import Usage

JsonObject = dict[str, Any]

# A higher number is not a token count.
MAX_TOKENS = 10**12
# Anthropic's, which are not part of its `input_tokens`.
_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")
_READ = ("prompt_tokens", "input_tokens", "promptTokenCount", "prompt_token_count", "prompt_eval_count")
_WROTE = (
    "completion_tokens", "output_tokens", "candidatesTokenCount", "candidates_token_count", "eval_count"
)  # fmt: skip
_BOTH = ("total_tokens", "totalTokenCount", "total_token_count")
_USAGES = ("usage", "usageMetadata", "usage_metadata")
_REASONS = ("finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason")
_CUT = ("length", "max_token", "max_output")
_FILTERED = ("filter", "safety", "prohibited", "blocklist", "blocked", "spii", "recitation", "sensitive",
             "refusal", "moderation", "guardrail", "flagged")  # fmt: skip


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, and the alternatives at its position with their log-probabilities."""

    token: str
    alternatives: list[tuple[str, float]]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        usage: tokens read and written; its cost is set by the client, which knows the prices.
        text: the text without thoughts; may be empty.
        thoughts: the text of a field for thoughts, where some servers put the whole answer.
        called: the arguments of a tool that the model called, as JSON.
        finish: why it ended, in lower case.
        refusal: why the model or a filter refused, or None.
        answered: whether anything was generated.
        error: the error in place of an answer.
    """

    usage: Usage = field(default_factory=Usage)
    text: str = ""
    thoughts: str = ""
    called: str = ""
    finish: str = "unknown"
    refusal: str | None = None
    answered: bool = False
    error: JsonObject | None = None
    _logprobs: Any = field(default=None, repr=False)

    @property
    def cut(self) -> bool:
        return any(word in self.finish for word in _CUT)

    def tokens(self) -> list[TokenLogprob]:
        """The tokens of the text with their log-probabilities; none where they cannot be read."""
        return list(_tokens(self._logprobs))


def parse_body(data: bytes) -> Any:
    """The JSON value of a response's body. Raises ValueError."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        text = data.decode("utf-8-sig", "replace").strip()
    if text.startswith(":"):  # signs of life in front of the answer
        text = "\n".join(line for line in text.split("\n") if not line.startswith(":")).strip()
    if text.startswith(("data:", "event:")):
        return _of_stream(text)
    return _lenient(text)


def read_completion(body: Any) -> Completion:
    """The chat completion in any JSON value. Never raises."""
    body = _dict(body)
    usage, choice = _usage(body), _choice(body)
    try:
        message = choice.get("message", choice.get("delta", choice))
        content = message.get("content", message.get("text")) if isinstance(message, dict) else message
        if content is None and message is not choice:
            content = choice.get("text")
        text = _clean(_content(content))
        refusal = _clean(_refusal(body, choice, message, content, text))
        finish = _clean(_finish(choice))
    except RecursionError:
        return Completion(usage, answered=True, finish="nested too deeply")
    if not refusal and any(word in finish for word in _FILTERED):
        refusal = f"a content filter stopped the answer ({finish})"
    answered = bool(choice) or bool(body.get("choices"))
    error, logprobs = _error(body, choice), choice.get("logprobs")
    thoughts, called = _thoughts(message), _clean(_called(message, content))
    return Completion(usage, text, thoughts, called, finish, refusal or None, answered, error, logprobs)


def _choice(body: JsonObject) -> JsonObject:
    """The first generated item: a choice, a candidate, or the body itself."""
    for name in ("choices", "candidates", "output"):
        found = body.get(name)
        if isinstance(found, list):
            # In a Responses body the thoughts are an item before the message.
            found = next((i for i in found if isinstance(i, dict) and i.get("type") != "reasoning"), {})
        if isinstance(found, dict) and found:
            return found
    return body if body.get("content") or isinstance(body.get("message"), dict) else {}


def _finish(choice: JsonObject) -> str:
    reasons = (choice.get(name) for name in _REASONS)
    return str(next((value for value in reasons if value not in (None, "")), "unknown")).lower()


def _error(body: JsonObject, choice: JsonObject) -> JsonObject | None:
    error = body.get("error") or choice.get("error") or (body if body.get("object") == "error" else None)
    base = _dict(body.get("base_resp"))  # MiniMax
    if not error and base.get("status_code"):
        return {"message": base.get("status_msg"), "code": base["status_code"]}
    return error if isinstance(error, dict) or not error else {"message": str(error)}


def _content(content: Any) -> str:
    """The text of a message's content. An object that is not a part is the answer itself, parsed by a server
    that was asked for JSON."""
    if isinstance(content, dict) and not {"type", "text", "parts", "content", "value"} & content.keys():
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, int | float):
        return json.dumps(content)
    return _text(content)


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(_text(item) for item in part)
    if not isinstance(part, dict) or _is_thought(part):
        return ""
    return next(
        (_text(part[k]) for k in ("text", "content", "parts", "value") if part.get(k) is not None), ""
    )


def _thoughts(message: Any) -> str:
    fields = (_dict(message).get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return next((_clean(value) for value in fields if value and isinstance(value, str)), "")


def _called(message: Any, content: Any) -> str:
    """The arguments of the first call of a tool: OpenAI's, its older form, or Anthropic's part."""
    calls = _dict(message).get("tool_calls")
    holders = [_dict(calls).get("function"), _dict(message).get("function_call")]
    parts = content if isinstance(content, list) else []
    holders += [part for part in parts if isinstance(part, dict) and part.get("type") == "tool_use"]
    given = (_dict(holder).get("arguments", _dict(holder).get("input")) for holder in holders)
    found = next((value for value in given if value), "")
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _is_thought(part: JsonObject) -> bool:
    kind = str(part.get("type", "")).lower()
    return part.get("thought") is True or any(word in kind for word in ("think", "reason", "thought"))


def _refusal(body: JsonObject, choice: JsonObject, message: Any, content: Any, text: str) -> str:
    """The statement that the model declined, or that a filter blocked the question or the answer."""
    parts = content if isinstance(content, list) else []
    for holder in (message, *parts):
        said = holder.get("refusal") if isinstance(holder, dict) else None
        if said and (isinstance(said, str) or not text):
            return f"the model refused: {said if isinstance(said, str) else 'no reason given'}"
    feedback = _dict(body.get("promptFeedback") or body.get("prompt_feedback"))
    if reason := feedback.get("blockReason") or feedback.get("block_reason"):
        return f"a content filter refused the question ({reason})"
    if not choice and _filtered(body.get("prompt_filter_results")):
        return "a content filter refused the question"
    return ""


def _filtered(results: Any) -> bool:
    """Whether any of Azure's filter results says `filtered`."""
    if isinstance(results, list):
        return any(_filtered(item) for item in results)
    if not isinstance(results, dict):
        return False
    return results.get("filtered") is True or any(_filtered(item) for item in results.values())


def _usage(body: JsonObject) -> Usage:
    """Token counts, wherever they are. What only the total includes was written: some servers' thoughts."""
    choices = body.get("choices")
    holders = [body, _dict(choices), _dict(body.get("x_groq"))]
    found = [_dict(holder.get(name)) for holder in holders for name in _USAGES]
    for counts in (*found, body):
        prompt, wrote, total = (_count(counts, names) for names in (_READ, _WROTE, _BOTH))
        if prompt is None and wrote is None and total is None:
            continue
        if prompt is not None and prompt == _count(counts, ("input_tokens",)) and total is None:
            prompt += sum(_count(counts, (name,)) or 0 for name in _CACHED)
        if prompt is None:
            prompt = max(0, (total or 0) - (wrote or 0))
        return Usage(prompt, max(wrote or 0, (total or 0) - prompt))
    return Usage()


def _count(counts: JsonObject, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = counts.get(name)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if 0 <= value <= MAX_TOKENS:  # not NaN
            return round(value)
    return None


def _tokens(logprobs: Any) -> Iterator[TokenLogprob]:
    content = _dict(logprobs).get("content", logprobs)
    for item in content if isinstance(content, list) else []:
        if not isinstance(item, dict) or not isinstance(item.get("token"), str):
            continue
        top = item.get("top_logprobs")
        if isinstance(top, dict):
            top = [{"token": token, "logprob": value} for token, value in top.items()]
        found = [_alternative(other) for other in [*(top if isinstance(top, list) else []), item]]
        # The token itself is usually among the alternatives.
        known = dict(other for other in reversed(found) if other is not None)
        yield TokenLogprob(item["token"], list(known.items()))
    legacy = _dict(logprobs)
    if isinstance(legacy.get("tokens"), list):  # the completions API's
        columns = [legacy.get(name) for name in ("token_logprobs", "top_logprobs")]
        own, top = (column if isinstance(column, list) else [] for column in columns)
        for i, token in enumerate(legacy["tokens"]):
            others = top[i] if i < len(top) else None
            item = {"token": token, "logprob": own[i] if i < len(own) else None, "top_logprobs": others}
            yield from _tokens([item])


def _alternative(item: Any) -> tuple[str, float] | None:
    token, value = _dict(item).get("token"), _dict(item).get("logprob")
    if not isinstance(token, str) or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if math.isnan(value) or value > 1 else (token, min(float(value), 0.0))


def _of_stream(text: str) -> JsonObject:
    """A completion from stream events, which some servers send unasked."""
    chunks = []
    for line in text.split("\n"):
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            chunks.append(_dict(_lenient(data)))
    if not chunks:
        raise ValueError("events without data")
    whole: JsonObject = {}
    parts, finish = [], None
    for chunk in chunks:
        whole |= {key: value for key, value in chunk.items() if value is not None}
        choice = _choice(chunk)
        parts.append(_dict(choice.get("delta", choice.get("message"))).get("content"))
        finish = choice.get("finish_reason") or finish
    message = {"role": "assistant", "content": [part for part in parts if part is not None]}
    return {**whole, "choices": [{"message": message, "finish_reason": finish}]}


def _lenient(text: str) -> Any:
    """JSON with NaN, endless digits and lone surrogates, as Python writes and reads it."""
    try:
        return json.loads(text, strict=False, parse_int=lambda digits: int(digits[:400]))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _dict(value: Any) -> JsonObject:
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, dict) else {}


def _clean(text: str) -> str:
    """Text that every table and file can hold: a lone surrogate becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
