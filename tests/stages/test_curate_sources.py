"""Where queries come from: folders of datasets, globs, stores; what is wrong with one is told."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import Curated, InputError, curate


def run(path: Any, **options: Any) -> Curated:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return curate(Queries(path=paths, **options))


def texts(path: Any, **options: Any) -> list[str]:
    return [text for part in run(path, **options).queries(100) for text in part["query"].to_pylist()]


def table(*values: str) -> pa.Table:
    return pa.table({"id": range(len(values)), "query": list(values)})


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"query": [f"query {number}" for number in range(20)]})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == [f"query {number}" for number in range(20)]
    # What a map left in its cache is no data.
    (tmp_path / "one/cache-0123.arrow").write_bytes((tmp_path / "one/data-00000-of-00003.arrow").read_bytes())
    assert run(tmp_path / "one").counts() == {"dpo": 20}
    both = DatasetDict(train=rows, test=Dataset.from_dict({"query": ["more"]}))
    both.save_to_disk(tmp_path / "both")
    assert sorted(texts(tmp_path / "both")) == sorted([*(f"query {number}" for number in range(20)), "more"])


def test_an_arrow_file(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "q.arrow", table("").schema) as writer:
        writer.write_table(table("one", "two"), max_chunksize=1)
    assert texts(tmp_path / "q.arrow") == ["one", "two"]
    with pytest.raises(InputError, match=r"q\.arrow: no column 'prompt'; it has \['id', 'query'\]"):
        texts(tmp_path / "q.arrow", column="prompt")
    (tmp_path / "q.arrow").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"q\.arrow"):
        texts(tmp_path / "q.arrow")


def test_a_folder_as_the_hub_has_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(table("one", "two"), data / "train-00000-of-00002.parquet")
    pq.write_table(table("three"), data / "train-00001-of-00002.parquet")
    (tmp_path / "README.md").write_text("# a card", "utf-8")
    (tmp_path / "dataset_infos.json").write_text("{}", "utf-8")
    (tmp_path / ".gitattributes").write_text("", "utf-8")
    (tmp_path / ".cache").mkdir()
    pq.write_table(table("hidden"), tmp_path / ".cache/x.parquet")
    assert texts(tmp_path) == ["one", "two", "three"]
    assert texts(f"{tmp_path}/data/*-00001-*.parquet") == ["three"]


def test_a_folder_of_lines(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"query": "two"}\n', "utf-8")
    (tmp_path / "a.txt").write_text("one\n", "utf-8")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/c.csv").write_text("query\nthree\n", "utf-8")
    assert texts(tmp_path) == ["one", "two", "three"]
    assert texts([tmp_path / "b.jsonl", tmp_path / "deeper"]) == ["two", "three"]
    for pattern in ("**", "**/*", "*"):
        assert run(tmp_path / pattern).counts() == {"dpo": 3}
        assert run(f"{tmp_path.as_uri()}/{pattern}").counts().total() == (2 if pattern == "*" else 3)


def test_a_store_that_fsspec_knows() -> None:
    store = fsspec.filesystem("memory")
    for name, text in {
        "a/q1.txt": "one",
        "a/q2.txt": "two\none",
        "a/b/q3.jsonl": '{"query": "three"}',
    }.items():
        store.pipe(f"/bucket/{name}", text.encode())
    assert texts("memory://bucket/a/q1.txt") == ["one"]
    assert texts("memory://bucket/a/*.txt") == ["one", "two"]
    assert texts("memory://bucket/**/q*.*") == ["three", "one", "two"]
    assert texts("memory://bucket/a") == ["three", "one", "two"]
    with pytest.raises(InputError, match=r"memory://bucket/none/.*: no file matches"):
        texts("memory://bucket/none/*.txt")
    with pytest.raises(InputError, match="No such file"):
        texts("memory://bucket/none.txt")


def test_a_store_that_pyarrow_opens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/q1.txt").write_text("one", "utf-8")
    pq.write_table(table("two"), tmp_path / "a/q2.parquet")
    uri = tmp_path.as_uri()
    assert texts(f"{uri}/a/q1.txt") == ["one"]
    assert texts(f"{uri}/*/q*") == ["one", "two"]
    assert texts(f"{uri}/a") == ["two"]
    with pytest.raises(InputError, match="No such file"):
        texts(f"{uri}/none.txt")


@pytest.mark.parametrize("path", ["nosuch://bucket/q.txt", "nosuch://bucket/*.txt"])
def test_a_store_that_nobody_knows(path: str) -> None:
    with pytest.raises(InputError, match=r"queries.path nosuch://bucket/.*nosuch"):
        texts(path)


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="environment") as caught:
        texts("s3://key:hunter2@bucket/q.txt")
    assert "hunter2" not in str(caught.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing else", "utf-8")
    with pytest.raises(InputError, match="no file matches"):
        texts(tmp_path)


def test_columns_of_labels(tmp_path: Path) -> None:
    rows = {"query": ["one", "two", "three"], "toxicity": [0.9, 0.1, None], "threat": [0.0, 0.2, None]}
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    (tmp_path / "q.csv").write_text("query,toxicity,threat\none,0.9,0\ntwo,0.1,.2\nthree,,\n", "utf-8")
    (tmp_path / "q.json").write_text(
        json.dumps([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]), "utf-8"
    )
    for kind in ("parquet", "csv", "json"):
        curated = run(tmp_path / f"q.{kind}", unsafe_columns=["toxicity", "threat"])
        assert [value for part in curated.queries(9) for value in part["unsafe"].to_pylist()] == [
            True,
            False,
            None,
        ]
        with (
            pytest.raises(InputError, match="no column 'obscene'")
            if kind != "json"
            else pytest.MonkeyPatch.context()
        ):
            run(tmp_path / f"q.{kind}", unsafe_columns=["obscene"])
