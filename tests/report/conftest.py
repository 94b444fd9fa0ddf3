"""A browser to look at the pages with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")


# Not of the session: its event loop runs as long as it does, and other tests have one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("pages are looked at in Chromium, and /usr/bin/chromium is not installed")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """What the opened pages complained of, or fetched from elsewhere."""
    return []


@pytest.fixture
def open_page(browser: Any, problems: list[str]) -> Iterator[Any]:
    """Opens a page of a file, at a width."""
    opened = []

    def open(path: Path, width: int, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        opened.append(page)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open
    for page in opened:
        page.close()
