"""What the documents point at is there."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from vpo_ray.recipe import parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """Headings as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.casefold()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for link in LINK.findall(document.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) < 700


def test_the_readmes_recipe_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    recipe = parse(yaml.safe_load(text), "README.md")
    assert recipe.render.frames > 9, "the preset's"


def test_the_plot_is_that_of_the_tables() -> None:
    """`make reference` draws it anew."""
    done = subprocess.run([sys.executable, "docs/plots.py"], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.decode() == (ROOT / "docs/learning.svg").read_text("utf-8")
    drawn = ElementTree.fromstring(done.stdout)
    names = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert names.count("SFT") == names.count("DPO") == names.count("the query itself") == 2


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    start = (tmp_path / "site/index.html").read_text("utf-8")
    assert "make demo" in start
    assert "demo.png" in start
    # The anchors of links between pages are GitHub's.
    assert 'id="every-candidate-rl"' in (tmp_path / "site/training.html").read_text("utf-8")
    # No page asks another server for a script, a style or a font.
    for page in (tmp_path / "site").glob("*.html"):
        assert not re.search(r"<(script|link)[^>]+(src|href)=\"https?:", page.read_text("utf-8")), page


def test_every_document_is_a_page_of_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}" not in nav] == []
