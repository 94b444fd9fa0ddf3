"""What a client may ask: the body of a chat completion, checked, and errors in OpenAI's form.

Only the fields that mean something for a prompt optimiser are read; others of OpenAI's are ignored,
so that any client works by changing `base_url`. Nothing here knows Ray or the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpo_ray.recipe import Serve

MAX_MESSAGES = 256
# JSON may spell one character as two escapes of six bytes; the rest of a body is small.
BYTES_PER_CHAR, BODY_ROOM = 12, 65536


class RequestError(ValueError):
    """A request that is refused: an HTTP status, and what OpenAI's error body says."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None


class StreamOptions(_Body):
    include_usage: bool = False


class ChatRequest(_Body):
    """The fields of OpenAI's chat completion request that this endpoint reads."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def max_body_bytes(settings: Serve) -> int:
    return settings.max_query_chars * BYTES_PER_CHAR + BODY_ROOM


def parse_request(body: bytes, settings: Serve) -> tuple[str, dict[str, Any]]:
    """The raw query, and the engine's fields of the request (all but `messages`).

    The query is the text of the last user message; what a client sends as a system message or as
    chat history is not used, since the task prompt lives in the checkpoint's chat template.

    Raises:
        RequestError: 400 for a body that is not as it should be, 404 for an unknown model, 413 for
            a query that is too long.
    """
    try:
        request = ChatRequest.model_validate(json.loads(body))
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValidationError as error:
        raise _explained(error) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if request.model != settings.model_name:
        message = (
            f"the model {request.model[:100]!r} does not exist; this endpoint serves {settings.model_name!r}"
        )
        raise RequestError(404, message, "model", "model_not_found")
    return _query(request.messages, settings), _engine_fields(request, settings)


def _query(messages: list[Message], settings: Serve) -> str:
    content = next((m.content for m in reversed(messages) if m.role == "user"), None)
    if content is None:
        raise RequestError(
            400, "no user message: send the query as the last message of role `user`", "messages"
        )
    query = content if isinstance(content, str) else "\n".join(part.text for part in content)
    if not query.strip():
        raise RequestError(400, "the query is empty", "messages", "empty_query")
    if len(query) > settings.max_query_chars:
        message = f"the query has {len(query)} characters, at most {settings.max_query_chars} are taken"
        raise RequestError(413, message, "messages", "query_too_long")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            400, "the query is not valid Unicode: a surrogate stands alone", "messages"
        ) from None
    return query


def _engine_fields(request: ChatRequest, settings: Serve) -> dict[str, Any]:
    def given(name: str, default: Any) -> Any:
        value = getattr(request, name)
        return default if value is None else value

    max_tokens = given("max_completion_tokens", given("max_tokens", settings.max_tokens))
    for param, value, limit in (
        ("n", request.n or 1, settings.max_n),
        ("max_tokens", max_tokens, settings.max_tokens),
    ):
        if value > limit:
            raise RequestError(400, f"{param} is {value}, at most {limit} is allowed here", param)
    fields = {
        "model": settings.model_name,
        "n": request.n or 1,
        "temperature": given("temperature", settings.temperature),
        "top_p": given("top_p", settings.top_p),
        "max_tokens": max_tokens,
        "seed": request.seed,
        "stop": request.stop,
        "stream": bool(request.stream),
    }
    if request.stream and request.stream_options:
        fields["stream_options"] = request.stream_options.model_dump()
    return fields


def _explained(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    # A union names its branches in the location; a client knows fields and indices only.
    parts = [str(p) for p in first["loc"] if isinstance(p, int) or str(p).isidentifier()]
    where = ".".join(p for p in parts if p not in ("str", "TextPart"))
    return RequestError(400, f"{where or 'the body'}: {first['msg']}", where or None)
