"""Files of sets as they come: other encodings, packings and line ends, and files that are something else."""

import gzip
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpo_ray.evaluation.sets import SetError, prompts_of_file, read_set, set_hash
from vpo_ray.recipe import EvaluatedSet
from vpo_ray.records import query_id

ENTRY = {"prompt_en": "a kite", "dimension": ["scene"], "auxiliary_info": {"scene": {"scene": "sky"}}}


# Without the time, which would be in the name of a test.
packed = partial(gzip.compress, mtime=0)


def queries(kind: str, path: Path, **more: Any) -> list[str]:
    settings = EvaluatedSet.model_validate({"kind": kind, "path": str(path), **more})
    return sorted(row["query"] for row in read_set("mine", settings, None))


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("bom.txt", "\ufeffa kite\r\na pond\r\n".encode(), ["a kite", "a pond"]),
        ("utf16.txt", "a kite\n好\n".encode("utf-16"), ["a kite", "好"]),
        ("separator.txt", "one\u2028line\nnext\u0085line\n".encode(), ["next\u0085line", "one\u2028line"]),
        ("separator.jsonl", '{"query": "one\u2028line"}\n'.encode(), ["one\u2028line"]),
        ("packed.jsonl.gz", packed(b'{"query": "a kite"}\n{"query": "a pond"}'), ["a kite", "a pond"]),
        ("list.json", b'["a kite", {"query": "a pond"}]', ["a kite", "a pond"]),
        ("one.json", b'{"query": "a kite"}', ["a kite"]),
        ("lines.json", b'{"query": "a kite"}\n{"query": "a pond"}\n', ["a kite", "a pond"]),
        ("bom.csv", '\ufeffquery,n\r\n"a, kite",1\r\n'.encode(), ["a, kite"]),
        ("emoji.txt", "🎈 réel\n👩‍🚀\n".encode(), ["👩‍🚀", "🎈 réel"]),
        ("half.txt", b"a kite\n\xff\xfe\n", ["a kite"]),
    ],
)
def test_a_file_that_can_be_read_is(tmp_path: Path, name: str, data: bytes, found: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    assert queries("file", tmp_path / name) == sorted(found)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", r"no row has a query in 'query' \(no rows\)"),
        ("blank.txt", b"\n \r\n\xe2\x80\x8b\n", r"3 × empty"),
        ("empty.jsonl", b"", "no rows"),
        ("empty.json", b"", "not a JSON file"),
        ("empty.csv", b"", "no column 'query'"),
        ("empty.parquet", b"", "not a Parquet file"),
        ("text.parquet", b"a kite\n", "not a Parquet file"),
        ("dict.json", b'{"prompts": ["a kite"]}', r"1 × no such column|found dict"),
        ("number.json", b"7", "found int"),
        ("text.jsonl", b"a kite\na pond\n", "2 × not JSON"),
        ("column.jsonl", b'{"text": "a kite"}\n', "1 × no such column"),
        ("text.jsonl.gz", b'{"query": "a kite"}\n', "Not a gzipped file"),
        ("half.jsonl.gz", packed(b'{"query": "a kite"}\n' * 99)[:-9], "end-of-stream"),
        ("queries.yaml", b"- a kite\n", "unknown kind"),
        ("long.txt", b"a" * 4001, "1 × too long"),
    ],
)
def test_a_file_without_queries_says_why(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SetError, match=message) as error:
        queries("file", tmp_path / name)
    assert str(error.value).startswith(f"set mine: evaluate.sets.mine.path {tmp_path / name}")


@pytest.mark.parametrize("kind", ["file", "vbench", "monetbench", "t2vsafetybench"])
def test_what_is_not_there_and_an_empty_folder_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SetError, match=r"evaluate\.sets\.mine\.path .*absent"):
        queries(kind, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetError, match=r"evaluate\.sets\.mine\.path .*empty"):
        queries(kind, tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\x00\x01", "null character"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        ({}, r"expected VBench_full_info\.json.*found an object"),
        ([], "found an empty list"),
        ("a kite", "found a text"),
        (["a kite"], "entry 1: `prompt_en`.*holds no prompt"),
        ([ENTRY, {**ENTRY, "prompt_en": None}], "entry 2: `prompt_en`"),
        ([ENTRY, {**ENTRY, "prompt_en": "\u200b"}], "entry 2: `prompt_en`"),
        ([{**ENTRY, "prompt_en": "\ud800"}], "entry 1.*no valid text"),
        ([{"prompt_en": "a kite"}], "entry 1 needs a list `dimension`"),
        ([{**ENTRY, "dimension": "scene"}], "entry 1 needs a list `dimension`"),
        ([{**ENTRY, "dimension": []}], "entry 1 needs a list `dimension`"),
        (
            [{**ENTRY, "dimension": ["Human_Anatomy"]}],
            "'Human_Anatomy' is no dimension of VBench.*kind: file",
        ),
        ([{**ENTRY, "dimension": [{"scene": 1}]}], "is no dimension of VBench"),
        ([{**ENTRY, "auxiliary_info": ["sky"]}], "`auxiliary_info` is a list"),
    ],
)
def test_what_is_not_vbenchs_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "VBench_full_info.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(SetError, match=message) as error:
        queries("vbench", file)
    assert str(file) in str(error.value)


def test_vbenchs_folder_is_not_its_file(tmp_path: Path) -> None:
    (tmp_path / "scene.txt").write_text("a kite\n", "utf-8")
    with pytest.raises(SetError, match=r"directory; expected VBench_full_info\.json"):
        queries("vbench", tmp_path)


def test_vbenchs_file_with_a_mark_packed(tmp_path: Path) -> None:
    file = tmp_path / "full.json.gz"
    file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([ENTRY, ENTRY]).encode()))
    assert queries("vbench", file) == ["a kite"]


def test_monetbench_is_one_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(SetError, match="not a Parquet file"):
        queries("monetbench", tmp_path)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "test.parquet")
    with pytest.raises(SetError, match="has no rows"):
        queries("monetbench", tmp_path)
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "test.parquet")
    with pytest.raises(SetError, match="row 1: 'prompt' holds no prompt"):
        queries("monetbench", tmp_path)
    pq.write_table(pa.table({"prompt": ["a kite"]}), tmp_path / "train.parquet")
    with pytest.raises(SetError, match="holds 2 Parquet files: name the one of the folder monetbench"):
        queries("monetbench", tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\na kite\n", "utf-8")
    with pytest.raises(SetError, match="unknown kind; use one of"):
        queries("monetbench", tmp_path / "prompts.csv")


def test_t2vsafetybenchs_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(b"harm\n\n\xff\n")
    with pytest.raises(SetError, match=r"1\.txt: line 3 is invalid UTF-8: save the file as UTF-8"):
        queries("t2vsafetybench", tmp_path)
    (tmp_path / "1.txt").write_bytes(b"harm\nnull \x00\n")
    with pytest.raises(SetError, match="line 2 holds no prompt"):
        queries("t2vsafetybench", tmp_path)
    (tmp_path / "1.txt").write_bytes(b"\n\n")
    with pytest.raises(SetError, match=r"1\.txt is empty: expected a prompt a line"):
        queries("t2vsafetybench", tmp_path)
    (tmp_path / "1.txt").rename(tmp_path / "15.txt")
    with pytest.raises(SetError, match=r"expected 1\.txt to 14\.txt, found 15\.txt"):
        queries("t2vsafetybench", tmp_path)
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress("\ufeffharm\u2028still\r\n".encode()))
    assert queries("t2vsafetybench", tmp_path) == ["harm\u2028still"]


def test_repeated_queries_are_one_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        {"query": "Cafe\u0301", "kind": "b"},
        {"query": "Café ", "kind": "a"},
        {"query": "Café", "kind": None},
    ]
    hashes = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        file = tmp_path / "queries.jsonl"
        file.write_text("".join(json.dumps(lines[n]) + "\n" for n in order), "utf-8")
        settings = EvaluatedSet(path=str(file), category="kind")
        with caplog.at_level(logging.INFO, "vpo_ray.evaluation.sets"):
            rows = read_set("mine", settings, None)
        assert [row["category"] for row in rows] == ["a"]
        hashes.add(set_hash(rows))
    assert len(hashes) == 1
    assert "2 queries are repeated" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1 of 1 queries have no prompt"),
        (b"\n", "1 of 1 queries have no prompt"),
        (b'{"query": "a kite"}\n', "row 1 needs a text"),
        (b'{"query": "a kite", "prompt": 3}\n', "row 1 needs a text"),
        (b'{"query": "a kite", "prompt": "A kite."}\n{broken\n', "row 2 cannot be read: not JSON"),
        (b'{"query": "a kite", "prompt": "\xff"}\n', "row 1 cannot be read: invalid UTF-8"),
        (b"a kite\n", "row 1 cannot be read: not JSON"),
    ],
)
def test_prompts_that_cannot_be_read_name_their_row(tmp_path: Path, data: bytes, message: str) -> None:
    wanted = [{"query": "a kite", "query_id": query_id("a kite")}]
    (tmp_path / "prompts.jsonl").write_bytes(data)
    with pytest.raises(SetError, match=message):
        prompts_of_file(str(tmp_path / "prompts.jsonl"), wanted)
    with pytest.raises(SetError, match="no file matches"):
        prompts_of_file(str(tmp_path / "*.csv"), wanted)


def test_a_missing_prompt_quotes_a_long_query_in_part(tmp_path: Path) -> None:
    query = "好" * 3000
    (tmp_path / "prompts.csv").write_text("query,prompt\n", "utf-8")
    with pytest.raises(SetError) as error:
        prompts_of_file(str(tmp_path / "prompts.csv"), [{"query": query, "query_id": query_id(query)}])
    assert len(str(error.value)) < 600
