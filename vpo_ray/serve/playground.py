"""The playground page at `/`: try a query in a browser. Nothing is loaded from other sites."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fastapi.responses import Response

from vpo_ray.prompts.conditions import LANGUAGE_NAMES
from vpo_ray.recipe import Serve
from vpo_ray.serve.images import films_images, takes_images

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
# Scripts and styles from this page's own files only, so that no text it shows can become one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page(settings: Serve) -> Response:
    """The page, with facts about the endpoint in its root element."""
    html = (FOLDER / "index.html").read_text("utf-8")
    facts = f'data-keys="{settings.keys is not None}" data-max-n="{settings.max_n}"'
    facts += f' data-videos="{settings.videos is not None}" data-ranks="{settings.best_of is not None}"'
    facts += f' data-sees="{takes_images(settings)}" data-animates="{films_images(settings)}"'
    if settings.feedback is not None and settings.feedback.notice:
        facts += f' data-notice="{escape(settings.feedback.notice)}"'
    text = html.replace('<html lang="en">', f'<html lang="en" {facts}>')
    named = sorted(LANGUAGE_NAMES.items(), key=lambda item: item[1])
    text = text.replace(
        "<!-- languages -->",
        "".join(f'<option value="{code}">{escape(name)}</option>' for code, name in named),
    )
    return Response(text, media_type=TYPES[".html"], headers=HEADERS)


def asset(name: str) -> Response | None:
    """A file of the page, or None."""
    known = {file.name: file for file in FOLDER.iterdir() if file.suffix in (".css", ".js")}
    return _file(known[name]) if name in known else None


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)
