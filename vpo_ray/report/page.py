"""What the pages share: one file with its style and script inside, a policy that allows nothing else, and
videos as files beside it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vpo_ray.files.folder import Folder, join
from vpo_ray.records import Row
from vpo_ray.storage.videos import VideoDamaged, VideoMissing, VideoStore

_HERE = Path(__file__).parent


def render_page(template: str, styles: Iterable[str], scripts: Iterable[str], **values: Any) -> bytes:
    """A page from a template of this folder, which escapes all that it is given; a dictionary goes into a
    block of JSON by `tojson`, which escapes what would end the block."""
    style, script = (
        "".join((_HERE / name).read_text("utf-8") for name in names) for names in (styles, scripts)
    )
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "number": _number, "seconds": _seconds}
    own = {"style": style, "script": script, "policy": _policy(style, script)}
    return environment.get_template(template).render(**own, **values).encode("utf-8")


def copy_video(page: Folder, key: str, stores: Iterable[VideoStore]) -> str | None:
    """The name of a video in the page's folder, where it is copied once; None when no store has it any more.

    Raises:
        StorageError: a folder or store cannot be read or written.
    """
    name = f"videos/{key}.mp4"
    if page.exists(name):
        return name
    for store in stores:
        try:
            page.write(name, store.read(key))
            return name
        except (VideoMissing, VideoDamaged):
            continue
    return None


def video_stores(evaluation: Folder, row: Row) -> list[VideoStore]:
    """Where a sample's video may be: where it was rendered to, or in the run around the evaluation, which may
    have been moved since."""
    found = []
    if row["video_uri"]:
        key = row["video_key"]
        found.append(VideoStore(row["video_uri"].replace(f"/{key[:2]}/{key}.mp4", "")))
    if evaluation.is_local:
        found.append(VideoStore(join(evaluation.uri, "../../videos")))
    return found


def _policy(style: str, script: str) -> str:
    """A content security policy for a page without a server: our style and script, pictures and videos by
    file."""
    sources = {
        "style-src": _hash(style),
        "script-src": _hash(script),
        "media-src": "'self' file:",
        "img-src": "'self' file:",
    }
    listed = "; ".join(f"{name} {value}" for name, value in sources.items())
    return f"default-src 'none'; {listed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    """Seconds for a reader: 0.045 s, 12.3 s, 4 min, 2.5 h."""
    if value is None:
        return ""
    if value < 120:
        return f"{value:.3g}\u202fs"
    return f"{value / 60:.3g}\u202fmin" if value < 7200 else f"{value / 3600:.3g}\u202fh"
