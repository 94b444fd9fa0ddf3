"""Forms (multipart/form-data): OpenAI's clients ask for a video with one."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vpo_ray.serve.errors import ApiError

MOST_FIELDS = 32
_IMAGES = ("input_reference", "image")
_NUMBER = re.compile(r"-?[0-9]{1,20}")


async def form_as_json(body: bytes, content_type: str) -> bytes:
    """A form as a JSON body with the same fields: its file `input_reference` is the `image`, `seed` a number.

    Raises:
        ApiError: 400, it is no such form, or has a file that is not taken.
    """
    parser = MultiPartParser(
        Headers({"content-type": content_type}),
        _at_once(body),
        max_files=1,
        max_fields=MOST_FIELDS,
        max_part_size=len(body),
    )
    parser.spool_max_size = len(body) + 1  # nothing of a request is written to a disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ApiError(400, f"the body is no form (multipart/form-data): {error}") from None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in _IMAGES:
                raise ApiError(400, f"{name[:100]}: a file that is not taken", name[:100])
            fields["image"] = base64.b64encode(await value.read()).decode()
        elif value.encode() not in body:  # read as another encoding, for want of this one
            raise ApiError(400, f"{name[:100]}: not UTF-8", name[:100])
        else:
            fields[name] = int(value) if name == "seed" and _NUMBER.fullmatch(value) else value
    return json.dumps(fields).encode()


async def _at_once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
