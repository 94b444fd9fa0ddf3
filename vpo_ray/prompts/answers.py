"""Answers in JSON: the schemas that ask for them, and how an answer is found and checked.

Not every server can hold a model to a schema. An object in a code fence, after a thought or between
sentences is an answer too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vpo_ray.prompts.thoughts import UnclosedThought, is_spoken, without_thoughts

Schema = dict[str, Any]

# Places tried as the start of an object in one answer, from its end.
MAX_STARTS = 500
LENGTHS = frozenset({"maxLength", "maxItems"})
# What OpenAI's strict mode refuses, or used to.
REFUSED = LENGTHS | {"minLength", "minItems", "minimum", "maximum", "pattern", "format"}
_IN_WORDS = (
    "\n\nAnswer with one JSON object alone, without any text or code fence around it. It must be of this "
    "JSON schema: "
)
_DECODER = json.JSONDecoder(strict=False)
# A string, or a comma that nothing follows in its list or object: many models write one.
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])', re.DOTALL)


class AnswerError(ValueError):
    """An answer of an LLM without what it was asked for."""


def object_schema(properties: dict[str, Any]) -> Schema:
    """The JSON schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def string_schema(max_chars: int) -> Schema:
    """The JSON schema of a string of at most so many characters."""
    return {"type": "string", "maxLength": max_chars}


def parse_object(text: str, properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in an answer, found by these properties where there is other text around it.

    Its values may still be of other types.

    Raises:
        AnswerError: the answer is not a JSON object.
    """
    try:
        # Grammars let raw control characters into strings, where they do no harm.
        value = json.loads(find_object(text, object_schema(properties)), strict=False)
        # An escape may hold half of a surrogate pair, which no table and no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"the answer is not JSON ({str(error)[:200]}): {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise AnswerError(f"the answer is not a JSON object: {text[:200]!r}")
    return value


def find_object(text: str, schema: Schema) -> str:
    """The JSON object of a schema in an answer: all of it, or the last such object outside its thoughts.
    A comma behind the last item of a list or object is no fault. If there is none, the text without thoughts,
    whose `schema_fault` says why."""
    found = _found(text, schema)
    if schema_fault(found, schema) is None:
        return found
    mended = _STRING_OR_COMMA.sub(lambda part: part[0] if part[0] != "," else "", text)
    again = _found(mended, schema) if mended != text else found
    return again if schema_fault(again, schema) is None else found


def _found(text: str, schema: Schema) -> str:
    if schema_fault(text, schema) is None:
        return text
    inner = _quoted(text)
    if schema_fault(inner, schema) is None:
        return inner
    try:
        said = without_thoughts(text)
    except UnclosedThought:
        said = text
    if _is_json(said):
        return said  # then nothing inside it is the answer
    # Marks of thoughts inside an object are quoted text, so the whole answer is searched.
    for start, end in _objects(text):
        if schema_fault(text[start:end], schema) is None and is_spoken(text[:start], text[end:]):
            return text[start:end]
    return said


def schema_fault(text: str, schema: Schema) -> str | None:
    """Why a text is not JSON of this schema, or None. Lengths are not checked."""
    import jsonschema

    try:
        value = json.loads(text, strict=False, parse_constant=_no_number)
        # An escape may hold half of a surrogate pair, which no table takes.
        json.dumps(value, ensure_ascii=False).encode()
        jsonschema.validate(value, without(schema, LENGTHS))
    except jsonschema.ValidationError as error:
        return f"{error.json_path}: {error.message[:200]}"
    except (ValueError, RecursionError) as error:
        return f"it does not parse ({str(error)[:200]})"
    return None


def response_format(schema: Schema) -> dict[str, Any]:
    """The `response_format` of a schema, without the limits that some servers refuse."""
    json_schema = {"name": "answer", "strict": True, "schema": without(schema, REFUSED)}
    return {"type": "json_schema", "json_schema": json_schema}


def in_words(messages: Sequence[Any], schema: Schema) -> list[Any]:
    """The messages with the schema appended to the last: for a server that takes no schema."""
    *before, last = messages
    added = _IN_WORDS + json.dumps(without(schema, REFUSED), ensure_ascii=False)
    if isinstance(last["content"], str):
        return [*before, {**last, "content": last["content"] + added}]
    return [*before, {**last, "content": [*last["content"], {"type": "text", "text": added.strip()}]}]


def without(schema: Any, keywords: frozenset[str]) -> Any:
    """A schema without some of its keywords."""
    if isinstance(schema, list):
        return [without(item, keywords) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: without(v, keywords) for k, v in schema.items() if k not in keywords}


def _objects(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the JSON objects in a text, the last one first."""
    at = len(text)
    for _ in range(MAX_STARTS):
        at = text.rfind("{", 0, at)
        if at < 0:
            return
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        yield at, end


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _quoted(text: str) -> str:
    """The string that a text encodes in JSON, or "": some servers encode an answer twice."""
    if not text.lstrip().startswith('"'):
        return ""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True
