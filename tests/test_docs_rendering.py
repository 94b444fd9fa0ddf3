"""The table of presets in docs/rendering.md is that of the file that recipes use."""

from pathlib import Path

from vpo_ray.recipe import video_presets

DOC = Path(__file__).parents[1] / "docs/rendering.md"


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
