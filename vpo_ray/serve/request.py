"""Requests of `/v1/chat/completions`, validated.

Only the fields that matter to a prompt optimiser are read; OpenAI's others are ignored, so that any client
works by changing `base_url`. Nothing here needs Ray or the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from vpo_ray.recipe import Serve
from vpo_ray.serve.errors import ApiError, explained
from vpo_ray.serve.images import NOT_FETCHED, AttachedImage, no_images, takes_images

# JSON may spell one character as two escapes of six bytes; the rest of a body is small.
BYTES_PER_CHAR, BODY_ROOM = 12, 65536


class RequestBody(BaseModel):
    """Strict about types, so that nothing is guessed; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


def _whole(text: str) -> str:
    text.encode("utf-8")  # a lone surrogate is a ValueError here, and would fail in the engine
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class ImageUrl(RequestBody):
    """`url` is a `data:` URI; nothing is fetched."""

    url: str


class ImagePart(RequestBody):
    """The image of a query, where the policy sees; one a request."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str | None:
    name = value.get("type") if isinstance(value, dict) else None
    return {"text": "TextPart", "image_url": "ImagePart"}.get(name) if isinstance(name, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[ImagePart, Tag("ImagePart")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part",
        custom_error_message="a part of a message has the type text or image_url",
    ),
]


class ChatMessage(RequestBody):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class StreamOptions(RequestBody):
    include_usage: bool | None = None


class ChatRequest(RequestBody):
    """The fields of OpenAI's chat completion request that this endpoint reads."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def max_body_bytes(settings: Serve, queries: int = 1) -> int:
    return settings.max_query_chars * BYTES_PER_CHAR * queries + BODY_ROOM


def read_json(body: bytes) -> Any:
    """The JSON value of a body. Raises ApiError (400) with the position of the fault."""
    try:
        return json.loads(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def parse_request(body: bytes, settings: Serve) -> tuple[str, dict[str, Any], AttachedImage | None]:
    """The query of a chat completion request, the engine's fields of it (all but `messages`), and its image.

    The query is the text of the user's messages (see `_query`); a system message is not used, since
    the task prompt lives in the checkpoint's chat template.

    Raises:
        ApiError: 400 for an invalid body, or images that are not taken, 404 for an unknown model, 413 for
            a query that is too long.
    """
    try:
        request = ChatRequest.model_validate(read_json(body))
    except ValidationError as error:
        raise explained(error, 400) from None
    check_model(request.model, settings)
    image = _image(request.messages, settings)
    return _query(request.messages, settings), _engine_fields(request, settings), image


def check_model(model: str | None, settings: Serve) -> None:
    """Raises ApiError (404) for any model but the served one."""
    if model not in (None, settings.model_name):
        message = f"the model {model[:100]!r} does not exist; this endpoint serves {settings.model_name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def check_query(query: str, settings: Serve, param: str) -> None:
    """Raises ApiError: 400 for no text, 413 for too much."""
    if not query.strip():
        raise ApiError(400, "the query is empty", param, "empty_query")
    if len(query) > settings.max_query_chars:
        message = f"the query has {len(query)} characters, at most {settings.max_query_chars} are allowed"
        raise ApiError(413, message, param, "query_too_long")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the query is not valid Unicode: it has a lone surrogate", param) from None


def _query(messages: list[ChatMessage], settings: Serve) -> str:
    """The user's first message with the later ones as edits of it, or the last one only.

    The policy learned to rewrite one query, so a conversation ("a cat", "make it night") becomes one query.
    The assistant's answers in between are the policy's own, and not part of it.
    """
    if len(messages) > settings.max_messages:
        message = f"{len(messages)} messages, at most {settings.max_messages} are allowed"
        raise ApiError(400, message, "messages", "too_many_messages")
    texts = [_text(message) for message in messages if message.role == "user" and message.content is not None]
    if not texts:
        message = "no user message: send the query as the last message of role `user`"
        raise ApiError(400, message, "messages")
    if len(texts) > 1 and settings.history == "refuse":
        message = "this endpoint takes one user message, no chat history"
        raise ApiError(400, message, "messages", "history_refused")
    if not texts[-1].strip():
        raise ApiError(400, "the query is empty", "messages", "empty_query")
    query = texts[-1]
    if settings.history == "edits":
        first, *edits = [text for text in texts if text.strip()]
        query = "\n".join([first, *(f"Edit: {edit}" for edit in edits)])
    check_query(query, settings, "messages")
    return query


def _image(messages: list[ChatMessage], settings: Serve) -> AttachedImage | None:
    """The image of the query: of any user message, or, where only the last one counts, of that.

    Raises:
        ApiError: 400 where the policy sees none, and for two images, one that is not the user's, or an
            address.
    """
    found: list[AttachedImage] = []
    last = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    for index, message in enumerate(messages):
        for number, part in enumerate(message.content if isinstance(message.content, list) else []):
            if not isinstance(part, ImagePart):
                continue
            param = f"messages.{index}.content.{number}"
            if not takes_images(settings):
                raise no_images(param)
            if message.role != "user":
                raise ApiError(400, f"{param}: an image belongs into a message of role `user`", param)
            if part.image_url.url[:5].lower() != "data:":
                told = f"{param}: {part.image_url.url[:60]!r} {NOT_FETCHED}"
                raise ApiError(400, told, param, "invalid_image_url")
            if index == last or settings.history != "last":
                found.append(AttachedImage(part.image_url.url, param))
    if len(found) > 1:
        told = f"the messages have {len(found)} images, a query has one"
        raise ApiError(400, told, found[1].param, "too_many_images")
    return found[0] if found else None


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    return message.content or ""


def _engine_fields(request: ChatRequest, settings: Serve) -> dict[str, Any]:
    def given(name: str, default: Any) -> Any:
        value = getattr(request, name)
        return default if value is None else value

    temperature = given("temperature", settings.temperature)
    max_tokens = given("max_completion_tokens", given("max_tokens", settings.max_tokens))
    for param, value, limit in (
        ("n", request.n or 1, settings.max_n),
        ("max_tokens", max_tokens, settings.max_tokens),
    ):
        if value > limit:
            raise ApiError(400, f"{param} is {value}, at most {limit} is allowed here", param)
    fields = {
        "model": settings.model_name,
        # Greedy candidates are all the same, and vLLM refuses them.
        "n": (request.n or 1) if temperature else 1,
        "temperature": temperature,
        "top_p": given("top_p", settings.top_p),
        "max_tokens": max_tokens,
        "seed": request.seed,
        "stop": request.stop,
        "stream": bool(request.stream),
    }
    if request.stream and request.stream_options:
        fields["stream_options"] = request.stream_options.model_dump()
    return fields
