"""What a command says may lose a character, a reader or its stream; the command goes on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vpo_ray import cli

ROOT = str(Path(__file__).parents[2])
SAYS = """
import logging, sys
from vpo_ray.cli import console
console.forgive()
from rich.console import Console
from rich.table import Table
for stream in (sys.stdout, sys.stderr):
    stream.write("a → b 猫 \\udcff\\n")
table = Table("→", "é"); table.add_row("猫", "x" * 9)
Console(width=40).print(table); Console(stderr=True).print(table)
logging.basicConfig(); logging.error("a → b")
sys.stdout.write("x" * 200_000 + "\\n"); sys.stdout.flush()
open("done", "w").write("whole")
sys.exit(3)
"""


def say(folder: Path, shell: str = '"$PY" -c "$SAYS"', **variables: str) -> tuple[int, bytes, bytes]:
    environment = {**os.environ, "PYTHONPATH": ROOT, "PY": sys.executable, "SAYS": SAYS, **variables}
    done = subprocess.run(["bash", "-c", shell], cwd=folder, env=environment, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr, done.stderr.decode("latin-1")
    assert (folder / "done").read_text("utf-8") == "whole"
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "latin-1:strict", "utf-8"])
def test_an_encoding_that_lacks_characters_loses_them_only(tmp_path: Path, encoding: str) -> None:
    status, out, err = say(tmp_path, PYTHONIOENCODING=encoding)
    assert status == 3
    assert out.startswith("a → b 猫 ?".encode() if encoding == "utf-8" else b"a ? b ? ?")
    assert b"ERROR:root:a " in err


@pytest.mark.parametrize(
    "shell",
    [
        '"$PY" -c "$SAYS" | head -c 5 > /dev/null; exit ${PIPESTATUS[0]}',
        '"$PY" -c "$SAYS" 2>&1 | true; exit ${PIPESTATUS[0]}',
        '"$PY" -c "$SAYS" >&-',
        '"$PY" -c "$SAYS" <&- >&- 2>&-',
    ],
    ids=["closed after some", "both closed", "no stdout", "nothing open"],
)
def test_output_that_nobody_takes(tmp_path: Path, shell: str) -> None:
    assert say(tmp_path, shell)[0] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["schema", "runs"])
def test_a_full_disk_is_an_error_and_told_once(tmp_path: Path, command: str) -> None:
    """More than a buffer takes, and less."""
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m vpo_ray.cli {command} > /dev/full'],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "vpo: error: the output cannot be written: No space left on device\n"


def test_a_command_says_what_its_terminal_cannot_show(tmp_path: Path) -> None:
    from vpo_ray.engines.video.engine import encode
    from vpo_ray.storage.videos import VideoStore

    facts = {"generator": "m", "frames": 5, "fps": 8.0, "width": 32, "height": 32, "seconds": 1.0, "seed": 1}
    video = encode(np.zeros((5, 32, 32, 3), np.uint8), 8, 20)
    VideoStore(tmp_path / "store").write("ab" + "0" * 30, video, {"prompt": "一只橙色的猫 →", **facts})
    environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "vpo_ray.cli", "videos", "ls", "store"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?????? ?" in done.stdout


def test_a_failure_of_a_library_is_no_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("not ours")

    monkeypatch.setattr("vpo_ray.world.tiny.make_tiny", broken)
    assert cli.main(["tiny", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
