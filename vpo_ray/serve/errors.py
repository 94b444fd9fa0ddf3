"""Errors of the endpoint, in OpenAI's form: a status, a message that says what to do, a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


class ApiError(ValueError):
    """A request that is refused: an HTTP status, and the content of OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's type of error for the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def explained(error: ValidationError, status: int) -> ApiError:
    """A fault of an invalid body, by the client's own field names: the deepest, as a value that is none of a
    union's branches has one in each, and of several the first."""
    faults = error.errors(include_url=False, include_input=False)
    first = max(faults, key=lambda fault: len(fault["loc"]))
    # A union names its branches in the location; a client knows fields and indices only.
    parts = [str(p) for p in first["loc"] if isinstance(p, int) or str(p).isidentifier()]
    where = ".".join(p for p in parts if p not in ("str", "TextPart", "ImagePart", "ImageUrl"))
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(status, f"{where or 'the body'}: {message}", where or None)
