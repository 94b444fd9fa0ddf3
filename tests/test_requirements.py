"""The locked versions are among those that the package says it works with."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize(
    ("lock", "extras"), [("cpu", ("engines", "cpu", "dev", "world")), ("gpu", ("engines", "gpu"))]
)
def test_what_is_locked_is_in_range(lock: str, extras: tuple[str, ...]) -> None:
    text = (ROOT / f"requirements/{lock}.txt").read_text("utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    wanted = PROJECT["dependencies"] + [w for name in extras for w in PROJECT["optional-dependencies"][name]]
    for requirement in map(Requirement, wanted):
        if requirement.name == "vpo-ray":
            continue  # another extra of its own
        version = locked[requirement.name.lower()]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, locked: {version}"
