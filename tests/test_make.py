"""`make test` runs all its parts and fails at the end, whichever part failed."""

import os
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
        tool.write_text(TOOL.replace("$FAILS", fails))
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
