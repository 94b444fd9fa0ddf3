"""Rows of files that users hand in: one reader for queries, SFT data and examples."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpo_ray.files.input_files import InputError
from vpo_ray.files.record_files import json_line
from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import curate
from vpo_ray.storage.sft_data import sft_rows

ROWS = [{"query": "a cat", "prompt": "A cat on a wall."}, {"query": "猫", "prompt": "Die Katze, müde."}]
TEXTS = [(row["query"], row["prompt"]) for row in ROWS]
MARKS = ["\u2028", "\u2029", "\x85", "\x7f"]


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Any) -> list[tuple[str, str]]:
    return [(row["query"], row["prompt"]) for row in sft_rows(str(path))]


def queries(path: Any, **options: Any) -> list[str]:
    made = curate(Queries(path=str(path), **options))
    return [text for part in made.queries(100) for text in part["query"].to_pylist()]


def table(rows: list[dict[str, str]], kind: pa.DataType | None = None) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows]).cast(kind or pa.string()) for name in rows[0]}
    return pa.table({"id": pa.array(range(len(rows))), **columns})


@pytest.mark.parametrize("mark", MARKS)
def test_a_line_of_json_ends_at_a_newline_only(tmp_path: Path, mark: str) -> None:
    rows = [{"query": f"a{mark}cat", "prompt": f"A paper lantern.{mark}It drifts."}] * 2
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    assert read(tmp_path / "s.jsonl") == [(rows[0]["query"], rows[0]["prompt"])] * 2
    assert queries(tmp_path / "s.jsonl") == [rows[0]["query"]]


def test_lines_that_we_write_can_be_split_by_any_reader() -> None:
    value = {"text": "".join(MARKS) + "\n\x0b\x0c\x1c\x1d\x1e\r猫"}
    line = json_line(value)
    assert line.splitlines() == [line[:-1]]
    assert json.loads(line) == value
    assert "猫" in line


@pytest.mark.parametrize("name", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_kind_packed_or_not(tmp_path: Path, name: str, packing: str) -> None:
    if name in ("jsonl", "ndjson"):
        data = jsonl(ROWS)
    elif name == "json":
        data = json.dumps(ROWS).encode()
    elif name in ("csv", "tsv"):
        sign = {"csv": ",", "tsv": "\t"}[name]
        lines = [("query", "prompt"), *TEXTS]
        data = "".join(sign.join(f'"{cell}"' for cell in line) + "\n" for line in lines).encode()
    else:
        sink = pa.BufferOutputStream()
        if name == "parquet":
            pq.write_table(table(ROWS), sink)
        else:
            with pa.ipc.new_file(sink, table(ROWS).schema) as writer:
                writer.write_table(table(ROWS))
        data = sink.getvalue().to_pybytes()
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    }[packing]
    path = tmp_path / f"s.{name}{packing}"
    path.write_bytes(pack(data))
    assert read(path) == TEXTS
    assert queries(path) == [row["query"] for row in ROWS]
    assert queries(tmp_path) == [row["query"] for row in ROWS], "found in a folder, too"


def test_a_file_that_was_packed_in_pieces(tmp_path: Path) -> None:
    lines = [jsonl([row]) for row in ROWS]
    (tmp_path / "s.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "s.jsonl.zst").write_bytes(b"".join(pa.compress(x, "zstd", asbytes=True) for x in lines))
    assert read(tmp_path / "s.jsonl.gz") == read(tmp_path / "s.jsonl.zst") == TEXTS


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_that_is_damaged_is_named(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"s.jsonl.{packing}"
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"sft.data .*s\.jsonl"):
        read(path)
    path.write_bytes(b"")
    with (
        pytest.raises(InputError, match=r"s\.jsonl|no rows")
        if packing != "bz2"
        else pytest.raises(InputError)
    ):
        queries(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "tsv"])
def test_files_with_a_byte_order_mark(tmp_path: Path, name: str, encoding: str) -> None:
    text = {
        "jsonl": jsonl(ROWS).decode(),
        "json": json.dumps(ROWS, ensure_ascii=False),
        "csv": "query,prompt\r\n" + "".join(f'"{q}","{p}"\r\n' for q, p in TEXTS),
        "tsv": "query\tprompt\r\n" + "".join(f"{q}\t{p}\r\n" for q, p in TEXTS),
    }[name]
    (tmp_path / f"s.{name}").write_bytes(text.encode(encoding))
    assert read(tmp_path / f"s.{name}") == TEXTS
    assert queries(tmp_path / f"s.{name}") == [row["query"] for row in ROWS]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.large_string(), pa.string_view(), "dictionary"],
    ids=str,
)
def test_columns_of_bytes_hold_utf8(tmp_path: Path, kind: Any) -> None:
    made = table(ROWS, pa.binary() if kind == "dictionary" else kind)
    if kind == "dictionary":
        for name in ("query", "prompt"):
            made = made.set_column(made.column_names.index(name), name, made[name].dictionary_encode())
    with pa.ipc.new_stream(tmp_path / "s.arrow", made.schema) as writer:
        writer.write_table(made)
    pq.write_table(made, tmp_path / "s.parquet")
    for name in ("s.arrow", "s.parquet"):
        assert read(tmp_path / name) == TEXTS
        assert queries(tmp_path / name) == [row["query"] for row in ROWS]


def test_bytes_that_are_no_utf8_cost_their_row(tmp_path: Path) -> None:
    column = pa.array([b"one", b"b\xff\xfed", None, b"two"])
    for number, values in enumerate([column, column.cast(pa.large_binary()), column.dictionary_encode()]):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"query": values}), path)
        made = curate(Queries(path=str(path)))
        assert [text for part in made.queries(9) for text in part["query"].to_pylist()] == ["one", "two"]
        assert made.counts()["invalid UTF-8"] == made.counts()["null"] == 1


def test_a_column_that_is_needed_may_be_there_once_only(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("query,prompt,query\na,b,c\n", "utf-8")
    (tmp_path / "s.tsv").write_text("query\tprompt\tquery\na\tb\tc\n", "utf-8")
    twice = pa.table([["a"], ["b"], ["c"]], names=["query", "prompt", "query"])
    pq.write_table(twice, tmp_path / "s.parquet")
    with pa.ipc.new_file(tmp_path / "s.arrow", twice.schema) as writer:
        writer.write_table(twice)
    for kind in ("csv", "tsv", "parquet", "arrow"):
        with pytest.raises(InputError, match=rf"s\.{kind}: column 'query' is there 2 times"):
            read(tmp_path / f"s.{kind}")
        with pytest.raises(InputError, match=rf"s\.{kind}: column 'query' is there 2 times"):
            queries(tmp_path / f"s.{kind}")
        assert queries(tmp_path / f"s.{kind}", column="prompt") == ["b"], "others may be there twice"


def test_a_name_given_twice_in_an_object_costs_the_row(tmp_path: Path) -> None:
    twice, beside = (
        '{"query": "a", "query": "b", "prompt": "c"}',
        '{"query": "d", "of": {"query": 1, "query": 2}}',
    )
    (tmp_path / "s.jsonl").write_text(f"{twice}\n{beside}\n", "utf-8")
    (tmp_path / "s.json").write_text(f"[{twice}, {beside}]", "utf-8")
    for kind in ("jsonl", "json"):
        assert queries(tmp_path / f"s.{kind}") == ["d"]
        with pytest.raises(InputError, match=r"row 1 cannot be read: not JSON"):
            read(tmp_path / f"s.{kind}")


def test_sft_data_may_be_a_uri_a_folder_or_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_bytes(jsonl(ROWS[:1]))
    (tmp_path / "data/b.csv").write_text('query,prompt\n猫,"Die Katze, müde."\n', "utf-8")
    fsspec.filesystem("memory").pipe("/sft/a.jsonl", jsonl(ROWS))
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [tmp_path / "data", "~/data", f"{tmp_path}/data/*", (tmp_path / "data").as_uri()]
    for source in [*sources, "memory://sft/a.jsonl", "memory://sft"]:
        assert read(source) == TEXTS, source
    with pytest.raises(InputError, match=r"sft.data memory://sft/none.jsonl: No such file"):
        read("memory://sft/none.jsonl")


def test_json_lines_in_a_file_called_json(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(jsonl(ROWS))
    (tmp_path / "one.json").write_bytes(jsonl(ROWS[:1]))
    (tmp_path / "no-ending").write_bytes(jsonl(ROWS))
    assert read(tmp_path / "s.json") == read(tmp_path / "no-ending") == TEXTS
    assert read(tmp_path / "one.json") == TEXTS[:1]
    assert queries(tmp_path / "s.json") == [row["query"] for row in ROWS]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"query": "a"}', "row 2 needs a text"),
        ('{"query": "a", "prompt": 3}', "row 2 needs a text"),
        ('{"query": " ", "prompt": "b"}', "row 2 needs a text"),
        ('{"query": "\\ud800", "prompt": "b"}', "row 2 needs a text"),
        ('["a", "b"]', "row 2 needs a text"),
        ('"ab"', "row 2 needs a text"),
        ("{", "row 2 cannot be read: not JSON"),
        (b'{"query": "caf\xe9", "prompt": "b"}', "row 2 cannot be read: invalid UTF-8"),
    ],
)
def test_a_bad_row_of_sft_data_is_named(tmp_path: Path, line: str | bytes, says: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "s.jsonl").write_bytes(jsonl(ROWS[:1]) + raw + b"\n")
    with pytest.raises(InputError, match=rf"sft.data .*s\.jsonl: {says}"):
        read(tmp_path / "s.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_json_lines_of_another_encoding_in_a_file_called_json(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "s.json").write_bytes(jsonl(ROWS).decode().encode(encoding))
    assert read(tmp_path / "s.json") == TEXTS


def test_a_time_that_python_cannot_have_costs_its_row(tmp_path: Path) -> None:
    far = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"query": ["a", "b"], "unsafe": far, "day": far}), tmp_path / "q.parquet")
    made = curate(Queries(path=str(tmp_path / "q.parquet"), column="day"))
    assert made.counts() == {"not text": 2}
    made = curate(Queries(path=str(tmp_path / "q.parquet"), unsafe_columns=["unsafe"]))
    assert made.counts() == {"bad unsafe label": 2}
    names = pa.ListArray.from_arrays([0, 1], pa.array([b"\xff"]).view(pa.string()))
    pq.write_table(pa.table({"query": names}), tmp_path / "l.parquet")
    assert curate(Queries(path=str(tmp_path / "l.parquet"))).counts() == {"invalid UTF-8": 1}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_quotation_mark_that_nothing_closes_costs_its_row(tmp_path: Path, ending: str) -> None:
    comma = "," if ending == "csv" else "\t"
    for count in (3, 5000):  # within and beyond the longest field
        lines = [f"query number {number}{comma}x" for number in range(count)]
        lines[1] = f'"an inch of 5{comma}x'
        path = tmp_path / f"{count}.{ending}"
        path.write_text("\n".join([f"query{comma}more", *lines, ""]), "utf-8")
        made = curate(Queries(path=str(path)))
        assert made.counts() == {"dpo": count - 1, "not CSV": 1}
        assert made.rows["text"].to_pylist()[1].startswith('"an inch of 5')


def test_lines_of_a_text_that_is_cut_off_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('id,query\n1,"a\nb"\n2,"first line\nsecond line\nthird', "utf-8")
    made = curate(Queries(path=str(tmp_path / "q.csv")))
    assert made.counts() == {"dpo": 1, "not CSV": 3}
