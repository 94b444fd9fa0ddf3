"""The pictures of these pages, made anew by `make pictures` from what `make demo` left in runs/laptop.

python docs/pictures.py                    # report, evaluation and the endpoint's page, in Chromium
python docs/pictures.py --watch runs/mine  # the live view of a run that goes on, as SVG
"""

from __future__ import annotations

import argparse
import io
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
QUERY = "smal red bal going rigth"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/laptop", help="a run that is done and evaluated")
    parser.add_argument("--watch", metavar="RUN", help="a run that goes on")
    given = parser.parse_args()
    if given.watch:
        watch(given.watch)
    else:
        photograph(Path(given.run))


def watch(run: str) -> None:
    """Wait until a quarter of a generation is done, and draw the view of that moment."""
    from rich.console import Console

    from vpo_ray.storage.run_dir import RunDir
    from vpo_ray.storage.run_state import states
    from vpo_ray.stream.status_text import status_table

    while True:
        for state in states(RunDir(run)):
            view = state.get("view") or {}
            stages = view.get("stages", [])
            if (
                stages
                and stages[-1]["total"]
                and stages[-1]["total"] <= 4 * stages[-1]["done"] < 4 * stages[-1]["total"]
            ):
                console = Console(record=True, width=110, file=io.StringIO())
                console.print(status_table(view))
                # Without the fonts that it would fetch.
                drawn = re.sub(
                    r"@font-face {.*?}\s*", "", console.export_svg(title="vpo run laptop"), flags=re.S
                )
                (DOCS / "terminal.svg").write_text(drawn, "utf-8")
                return
        time.sleep(1)


def photograph(run: Path) -> None:
    """Screenshots of the run's report, its evaluation, and the page of its endpoint, at two widths."""
    from playwright.sync_api import sync_playwright

    from vpo_ray.storage.run_dir import RunDir

    found = RunDir(str(run)).newest_evaluation()
    assert found is not None, f"{run} has no evaluation: make demo"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name, file in (
            ("report", run / "report/index.html"),
            ("evaluation", run / f"evaluation/{found['id']}/report.html"),
        ):
            for width in (1280, 390):
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.goto(file.resolve().as_uri())
                page.screenshot(path=DOCS / f"{name}-{width}.png")
                page.close()
        port = _free_port()
        command = [sys.executable, "-P", "-m", "vpo_ray.cli", "serve", str(run / "checkpoints/dpo")]
        command += ["--recipe", str(run / "recipe.yaml")]
        server = subprocess.Popen([*command, "--set", f"serve.port={port}"])
        try:
            for width in (1280, 390):
                _ask(browser, f"http://127.0.0.1:{port}/", width)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=120)
        browser.close()


def _ask(browser: Any, url: str, width: int) -> None:
    from playwright.sync_api import Error

    page = browser.new_page(viewport={"width": width, "height": 900})
    end = time.monotonic() + 300
    while True:
        try:
            if page.goto(f"{url}health").ok and page.goto(url).ok:
                break
        except Error:
            if time.monotonic() > end:
                raise
        time.sleep(1)
    page.locator("#query").fill(QUERY)
    page.locator("#query").press("Control+Enter")
    while not page.locator("#actions").is_visible():  # the page's policy forbids Playwright's own waiting
        time.sleep(0.5)
    page.screenshot(path=DOCS / f"page-{width}.png")
    page.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
