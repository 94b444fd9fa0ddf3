"""What docs/rendering.md shows is so: the table of presets is that of the file, and its recipes are read."""

import re
from pathlib import Path

import yaml

from vpo_ray.recipe import load, video_presets

DOC = Path(__file__).parents[1] / "docs/rendering.md"
TINY = Path(__file__).parents[1] / "jobs/recipes/tiny.yaml"


def rows() -> list[str]:
    lines = []
    for name, preset in video_presets().items():
        settings, seconds = preset["settings"], preset.get("seconds", {})
        shape = "{frames} x {width} x {height}".format(**settings)
        times = [str(seconds.get(kind, "-")) for kind in ("A100", "H100")]
        lines.append(
            " | ".join([f"| `{name}`", settings["model"], shape, str(settings["steps"]), *times]) + " |"
        )
    return lines


def test_the_table_of_presets_is_that_of_the_file() -> None:
    text = DOC.read_text("utf-8")
    table = text[text.index("<!-- presets") :].split("\n\n")[1].splitlines()
    assert table[2:] == rows(), "put these lines there:\n" + "\n".join(rows())


def test_its_recipes_are_read() -> None:
    blocks = re.findall("```yaml\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        sections = yaml.safe_load(block)
        recipe = load(TINY, [f"{name}={yaml.safe_dump(section)}" for name, section in sections.items()])
        assert recipe.render.model == sections["render"]["model"]
