"""Odd but real inputs: what a shell, a script or a disk hands to `vpo`, and the one line that it answers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray.files.folder import Folder, StorageError

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def vpo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs a command in an empty folder; gives its status and what it said on stderr, without a trace."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        status = cli.main(arguments)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said

    return run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is a YAML mapping of sections, this is an empty file"),
        ("- a\n", "is a YAML mapping of sections, this is list"),
        ("name: 2024-13-45\n", "month must be in 1..12: a text that looks like a date"),
        ("seed: !!int seven\n", "needs quotation marks"),
        ("name: " + "[" * 5000 + "]" * 5000, "not a YAML file: its brackets are too deep"),
        ("name: a\nname: b\n", "`name` is given twice"),
    ],
)
def test_a_file_that_is_no_recipe(vpo: Say, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    status, said = vpo("plan", "mine.yaml")
    assert (status, says in said, "mine.yaml" in said) == (2, True, True), said


@pytest.mark.parametrize(
    ("value", "says"),
    [("name=2024-13-45", "looks like a date"), ("render={steps: 3, steps: 4}", "`steps` is given twice")],
)
def test_an_override_is_read_as_the_file_is(vpo: Say, value: str, says: str) -> None:
    status, said = vpo("plan", TINY, "--set", value)
    assert (status, f"--set {value}" in said, says in said) == (2, True, True), said


@pytest.mark.parametrize(
    "command", [["runs"], ["status"], ["logs"], ["videos", "ls"], ["report", TINY, "--out"]]
)
def test_a_store_without_a_bucket_is_told(vpo: Say, command: list[str]) -> None:
    status, said = vpo(*command, "s3://")
    assert (status, "s3:// names no bucket: write it as s3://bucket/folder" in said) == (1, True), said


@pytest.mark.parametrize(
    "command",
    [["runs"], ["status"], ["videos", "prune"], ["forget", "--key", "a"], ["collect", "--to", "it"]],
)
def test_an_empty_name_is_not_the_working_directory(vpo: Say, command: list[str]) -> None:
    """As of a variable of a script that is not set."""
    status, said = vpo(*command, "")
    assert (status, "'' names no folder" in said) == (1, True), said


def test_an_empty_out_is_not_the_recipes(vpo: Say) -> None:
    status, said = vpo("report", TINY, "--out", "")
    assert (status, "out: String should have at least 1 character" in said) == (2, True), said


def test_a_report_of_a_folder_that_is_no_run_writes_nothing(vpo: Say, tmp_path: Path) -> None:
    status, said = vpo("report", TINY, "--out", "TYPO")
    assert status == 1
    assert f"{tmp_path / 'TYPO'} is no run directory: it has no versions.json" in said
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_serving_alone_does_not_have_is_refused(vpo: Say) -> None:
    status, said = vpo("serve", "policy", "--set", "port=9000", "--config")
    assert (status, "--set port: without a recipe there are keys of `serve` only" in said) == (2, True), said


@pytest.mark.parametrize(
    "command",
    [["tiny", "file/a"], ["init", "file/a/b.yaml", "--example", "tiny"], ["plan", "n" * 300 + ".yaml"]],
)
def test_what_the_disk_refuses_is_a_line_with_its_path(vpo: Say, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("")
    status, said = vpo(*command)
    assert status in (1, 2)
    assert said.count("\n") == 1
    assert said.startswith("vpo: error: ")
    assert "Not a directory" in said or "File name too long" in said


def test_a_folder_that_nobody_may_read_hides_no_run(vpo: Say, tmp_path: Path, monkeypatch: Any) -> None:
    """`lost+found` of a volume, or another's run."""
    for name in ("mine", "theirs"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        Folder(tmp_path / "runs" / name).write_json("versions.json", {})
    (tmp_path / "runs/theirs").chmod(0)
    if os.access(tmp_path / "runs/theirs/versions.json", os.R_OK):
        exists = Folder.exists

        def refused(self: Folder, name: str) -> bool:
            if self.uri.endswith("theirs"):
                raise StorageError(f"cannot look for {self.at(name)}: Permission denied")
            return exists(self, name)

        monkeypatch.setattr(Folder, "exists", refused)
    status, said = vpo("runs")
    assert (status, said.count("\n")) == (1, 1)
    assert f"{tmp_path / 'runs/theirs'} cannot be read" in said
    (tmp_path / "runs/theirs").chmod(0o700)


@pytest.mark.parametrize("name", ["with space", "ü %20#?&=+", "100%", "#", "a:b", "[x]*", "-x", "日本"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    Folder(tmp_path / name).write_json("ledger.json", {"a": 1})
    assert (Folder(tmp_path / name) / "x").uri == str(tmp_path / name / "x")
    assert Folder(tmp_path / name).read_json("ledger.json") == {"a": 1}
    assert (tmp_path / name / "ledger.json").is_file()
