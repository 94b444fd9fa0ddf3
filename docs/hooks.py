"""What MkDocs is told beyond mkdocs.yml, so that one text is right on the site and in the repository.

Headings have the anchors that GitHub gives them. A link to a file outside docs/ is its path there, for the
site has no such page. The start page is the README.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def anchor(title, separator):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.casefold()).strip().replace(" ", separator)


def on_config(config):
    config.mdx_configs["toc"] = {"slugify": anchor}
    return config


def on_files(files, config):
    text = (ROOT / "README.md").read_text("utf-8")
    text = text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](../CONTRIBUTING.md)")
    files.append(File.generated(config, "index.md", content=text))
    for script in ("hooks.py", "pictures.py"):
        files.remove(files.get_file_from_path(script))
    return files


def on_page_markdown(markdown, page, config, files):
    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)", _as_path, markdown)


def _as_path(link):
    text, path = link[1], link[2].removeprefix("../")
    return text if path in text else f"{text} (`{path}`)"
