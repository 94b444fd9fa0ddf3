"""The plot of docs/learning.md: truth with its interval, drawn from the tables that the page has.

python docs/plots.py > docs/learning.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

PAGE = Path(__file__).with_name("learning.md")
HEADINGS = {
    "What `make demo` shows": "the demo",
    "The paper's table, in small": "the paper's table, in small",
}
_VALUE = re.compile(r"\**([\d.]+) \[([\d.]+), ([\d.]+)\]")

ROW, TOP, LEFT, WIDTH, RIGHT = 26, 44, 230, 360, 60  # pixels
BEFORE, AFTER = "#8a8f98", "#2f7ed8"


def rows(page: str) -> Iterator[tuple[str, list[tuple[str, float, float, float]]]]:
    """By table: what it shows, and of each policy its name, truth, and the interval's ends."""
    for heading, title in HEADINGS.items():
        section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        found = []
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if line.startswith("|") and len(cells) > 1 and (value := _VALUE.match(cells[1])):
                name = cells[0].strip("* ")
                found.append((name, *map(float, value.groups())))
        yield title, found


def drawn(page: str) -> str:
    """The plot as SVG."""
    parts, y = [], 0
    for title, found in rows(page):
        parts.append(f'<text x="8" y="{y + 20}" font-weight="bold">Truth, {escape(title)}</text>')
        bottom = y + TOP + ROW * len(found) - 10
        for tick in range(0, 11, 2):
            x = LEFT + WIDTH * tick / 10
            parts.append(f'<line x1="{x:g}" y1="{y + TOP - 12}" x2="{x:g}" y2="{bottom}" stroke="#8884"/>')
            parts.append(f'<text x="{x:g}" y="{y + TOP - 16}" text-anchor="middle">{tick / 10:g}</text>')
        for number, (name, value, low, high) in enumerate(found):
            at, colour = y + TOP + ROW * number + 4, BEFORE if number == 0 else AFTER
            x, left, right = (LEFT + WIDTH * share for share in (value, low, high))
            parts.append(f'<text x="{LEFT - 12}" y="{at + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(
                f'<line x1="{left:g}" y1="{at}" x2="{right:g}" y2="{at}" stroke="{colour}" stroke-width="3"/>'
            )
            parts.append(f'<circle cx="{x:g}" cy="{at}" r="5" fill="{colour}"/>')
            parts.append(f'<text x="{right + 8:g}" y="{at + 4}">{value:.2f}</text>')
        y = bottom + 20
    width = LEFT + WIDTH + RIGHT
    dark = "@media (prefers-color-scheme: dark) { text { fill: #bbb } }"
    style = f"text {{ font: 13px sans-serif; fill: #555 }} {dark}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
        f'role="img"><title>Truth by policy, with 95 % intervals</title><style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.write(drawn(PAGE.read_text("utf-8")))
