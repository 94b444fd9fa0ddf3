"""The page of blind pairs at `/compare/`, from the folder that `vpo compare page` wrote (`serve.compare`).

Raters send their files of votes back themselves: nothing is written here.
"""

from __future__ import annotations

import re

from fastapi.responses import Response

from vpo_ray.files.folder import Folder

# The page brings a policy of its own.
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "bytes",
}
_VIDEO = re.compile(r"videos/[0-9a-z]{1,64}\.mp4")
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")


def pairs_file(folder: str, name: str, asked: str | None) -> Response | None:
    """The page, under the name "", or one of its videos; None if there is no such file.

    Args:
        asked: the request's `Range`; some browsers play no video that they cannot get in parts.
    """
    if name and not _VIDEO.fullmatch(name):
        return None
    try:
        data = Folder(folder).read(name or "index.html")
    except FileNotFoundError:
        return None
    if not name:
        return Response(data, media_type="text/html; charset=utf-8", headers=HEADERS)
    found = _RANGE.fullmatch(asked or "")
    if found is None:
        return Response(data, media_type="video/mp4", headers=HEADERS)
    start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    if start > end:
        return Response(status_code=416, headers={**HEADERS, "Content-Range": f"bytes */{len(data)}"})
    part = {**HEADERS, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return Response(data[start : end + 1], 206, media_type="video/mp4", headers=part)
