"""A page as a browser would take it, and texts that try to be more than text."""

import time
from html.parser import HTMLParser
from typing import Any

ATTACK = (
    """<script>document.title='owned'</script><img src=x onerror="document.title='owned'"> "&' {{ 7 * 7 }}"""
)
ARABIC = "رجل يمشي في الصحراء عند الغروب"


class Tags(HTMLParser):
    """What a browser would make of the page: elements with attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def until(locator: Any, condition: str, seconds: float = 20) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not locator.evaluate_all(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.1)
