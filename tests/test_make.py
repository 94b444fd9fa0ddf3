"""`make test` runs all its parts and fails at the end, whichever part failed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What stands for each tool: it says what it was given, and fails where it is to.
TOOL = """#!/bin/sh
echo "$(basename "$0") $*"
case "$(basename "$0") $*" in $FAILS) exit 1;; esac
"""


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("none", ""),
        ("ruff*", "make test: failed: lint"),
        ("*not?engine*", "make test: failed: fast"),
        ("pytest*|mypy*", "make test: failed: types fast engines"),
    ],
)
def test_a_part_that_fails_hides_no_other(tmp_path: Path, fails: str, told: str) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("ruff", "mypy", "pytest"):
        tool = tmp_path / "bin" / name
        tool.write_text(TOOL.replace("$FAILS", fails), "utf-8")
        tool.chmod(0o755)
    (tmp_path / ".ready").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "LANG", "LC_"))}
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={tmp_path}", "test"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    ran = [line.split()[0] for line in lines if line.startswith(("ruff ", "mypy", "pytest "))]
    assert [*dict.fromkeys(ran)] == ["ruff", "mypy", "pytest"]
    assert ran.count("pytest") == 2
    assert (done.returncode == 0) == (not told), done.stdout
    assert not told or told in lines


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [(["python3.13"], "python3.13"), (["python3.11", "python3.12"], "python3.11"), (["python3.14"], None)],
)
def test_make_takes_the_python_that_is_there(tmp_path: Path, pythons: list[str], taken: str | None) -> None:
    make = shutil.which("make")
    assert make is not None
    (tmp_path / "bin").mkdir()
    for name in pythons:
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\necho {name} was asked to $*\nexit 1\n", "utf-8")
        tool.chmod(0o755)
    done = subprocess.run(
        [make, "-C", str(ROOT), f"VENV={tmp_path}/venv", "lint"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    if taken is not None:
        assert f"{taken} was asked to -m venv {tmp_path}/venv" in done.stdout
    else:
        assert "no Python 3.11 to 3.13 here: apt-get install python3 python3-venv" in done.stdout
        assert "make PYTHON=$(uv python find 3.12)" in done.stdout
