"""Text that users hand in: marks, encodings and line ends; every place that takes a file takes it."""

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from vpo_ray.engines.reward.checklist import ChecklistError, load_checklist
from vpo_ray.files.text_files import NotTextError, TextFileError, lines, read_lines, read_text
from vpo_ray.prompts.policy_prompt import PromptError, read_prompt
from vpo_ray.recipe import Checklist, Queries, RecipeError, Rules, load
from vpo_ray.serve.keys import KeyFileError, KeyRing, make_key
from vpo_ray.serve.safety import Keywords
from vpo_ray.stages.curate.rules import apply

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]  # the last two with their marks


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_comes_without_its_mark_and_with_plain_line_ends(
    tmp_path: Path, encoding: str, end: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"eins{end}ein 猫{end}".encode(encoding))
    assert read_text(path) == "eins\nein 猫\n"
    assert read_lines(path) == ["eins", "ein 猫"]


def test_big_endian_marks_are_obeyed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "猫\n".encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == "猫\n"


@pytest.mark.parametrize("mark", SEPARATORS)
def test_only_a_newline_ends_a_line(mark: str) -> None:
    assert lines(f"a{mark}b\nc\r\nd") == [f"a{mark}b", "c", "d"]
    assert lines("a\n\nb\n", keepends=True) == ["a\n", "\n", "b\n"]
    assert lines("") == []


def test_marks_inside_joined_files_are_taken_off() -> None:
    assert lines("one\n\ufefftwo\n") == ["one", "two"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"one\ntwo\ncaf\xe9\n", "line 3 is not UTF-8 text"),
        ("one\ntwo".encode("utf-16-le"), "line 1 holds a null character"),
        (b"\xff\xfea\x00\n\x00b", "line 2 is not UTF-16-LE text"),
    ],
)
def test_what_is_no_text_is_told_with_its_line(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(NotTextError, match=says) as caught:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(caught.value)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    for source in (tmp_path / "none", tmp_path, "memory://none/a.txt", "nosuch://bucket/a.txt"):
        with pytest.raises(TextFileError, match="cannot read"):
            read_text(source)
    with pytest.raises(TextFileError, match="environment"):
        read_text("s3://key:hunter2@bucket/a.txt")


def test_where_text_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one", "utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    fsspec.filesystem("memory").pipe("/texts/a.txt", b"one")
    for source in ("~/a.txt", "~/a.txt.gz", (tmp_path / "a.txt").as_uri(), "memory://texts/a.txt"):
        assert read_text(source) == "one", source
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one")[:-9])
    with pytest.raises(TextFileError, match=r"a\.txt\.gz"):
        read_text("~/a.txt.gz")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_file_of_text_may_have_a_mark(tmp_path: Path, encoding: str) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
        return str(tmp_path / name)

    assert read_prompt(write("prompt.txt", "Ask\n{query}\n")) == "Ask\n{query}"

    gate = Keywords(write("words.txt", "beheading\ngore\n"))
    assert [asyncio.run(gate.check(f"a {word} scene")) is not None for word in ("beheading", "gore")] == [
        True,
        True,
    ]
    rules = Rules(keywords=write("rules.txt", "beheading\ngore\n"))
    import pyarrow as pa

    assert (apply(pa.array(["a beheading", "a gore", "a cat"]), rules) != 0).tolist() == [True, True, False]

    key, line = make_key("one")
    assert KeyRing(write("keys", f"{line}\n")).find(f"Bearer {key}").name == "one"

    questions = write("q.txt", 'Is it "[[prompt]]"?\nIs it good?\n')
    settings = Checklist(questions=questions, weights=write("w.json", "[1, 2]"))
    assert [q.text for q in load_checklist(settings).questions] == [
        'Is it "[[prompt]]"?',
        "Is it good?",
    ]
    entry = {"questions": [{"question": "Is it good?", "weight": 1}]}
    assert len(load_checklist(Checklist(file=write("c.yaml", json.dumps(entry)))).questions) == 1

    with pytest.raises(RecipeError, match="unknown key") as caught:
        load(write("recipe.yaml", "nmae: a\n"))
    assert "`name`" in str(caught.value)


@pytest.mark.parametrize("mark", SEPARATORS)
def test_lists_of_lines_end_them_at_newlines_only(tmp_path: Path, mark: str) -> None:
    (tmp_path / "q.txt").write_text(f"Is it{mark}good?\nIs it red?\n", "utf-8")
    (tmp_path / "w.json").write_text("[1, 2]", "utf-8")
    settings = Checklist(questions=str(tmp_path / "q.txt"), weights=str(tmp_path / "w.json"))
    assert [q.text for q in load_checklist(settings).questions] == [
        f"Is it{mark}good?",
        "Is it red?",
    ]


def test_a_key_given_twice_in_a_checklist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("questions:\n- {question: Good, weight: 1, weight: 2}\n", "utf-8")
    with pytest.raises(ChecklistError, match="given twice"):
        load_checklist(Checklist(file=str(tmp_path / "c.yaml")))


@pytest.mark.parametrize(
    ("use", "error"),
    [(read_prompt, PromptError), (KeyRing, KeyFileError), (load, RecipeError)],
)
def test_bytes_that_are_no_text_are_told_with_file_and_line(
    tmp_path: Path, use: Any, error: type[Exception]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(error, match="line 2 is not UTF-8 text") as caught:
        use(str(tmp_path / "a.txt"))
    assert "a.txt" in str(caught.value)


def test_keys_are_looked_at_every_second_so_that_a_uri_is_none() -> None:
    with pytest.raises(KeyFileError, match="is a URI"):
        KeyRing("s3://bucket/keys")


def test_queries_hold_what_lines_may_hold(tmp_path: Path) -> None:
    from vpo_ray.stages.curate import curate

    text = "a lantern{mark}over a lake"
    rows = [text.format(mark=mark) for mark in SEPARATORS]
    (tmp_path / "q.txt").write_text("\n".join(rows), "utf-8")
    made = curate(Queries(path=str(tmp_path / "q.txt")))
    assert [q for part in made.queries(100) for q in part["query"].to_pylist()] == rows
