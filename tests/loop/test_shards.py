"""Shards: the queries of a run, divided among drivers that work at one time."""

import pickle
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.records import Shard, query_id
from vpo_ray.storage.run_dir import RunDir


def taken(ids: list[str], of: int) -> list[list[str]]:
    """The ids that each shard takes."""
    rows = pa.table({"query_id": pa.array(ids, pa.string())})
    return [rows.filter(Shard(n, of).rows)["query_id"].to_pylist() for n in range(1, of + 1)]


ANY_ID = st.one_of(
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.sampled_from(["0" * 32, "f" * 32, "7" + "f" * 31, "8" + "0" * 31, "", "q1"]),
)


@given(st.lists(ANY_ID, max_size=20), st.integers(1, 40))
def test_every_query_is_in_exactly_one_shard(ids: list[str], of: int) -> None:
    assert Counter(query for part in taken(ids, of) for query in part) == Counter(ids)


def test_shards_are_of_about_one_size() -> None:
    ids = [query_id(f"query {n}") for n in range(8000)]
    assert all(850 < len(part) < 1150 for part in taken(ids, 8))


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "1/8/2", "a/b", "3 of 8"])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text or "''")):
        Shard.parse(text)


def test_a_text_of_a_shard() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"


def queries(run: RunDir, count: int = 40) -> list[str]:
    """Queries in parts of one row; their ids."""
    texts = [f"a cat on chair {n}" for n in range(count)]
    for text in texts:
        run.table("queries").append([{"query_id": query_id(text), "query": text, "split": "dpo"}])
    return [query_id(text) for text in texts]


def test_a_shards_tables_show_its_rows_and_merge_nothing(tmp_path: Path) -> None:
    whole = RunDir(tmp_path)
    ids = queries(whole)
    seen: list[str] = []
    for index in (1, 2, 3):
        run = pickle.loads(pickle.dumps(RunDir(tmp_path, Shard(index, 3))))
        table = pickle.loads(pickle.dumps(run.table("queries")))
        seen += sorted(row["query_id"] for row in table.rows())
        assert table.count() == len(table.keys())
        assert table.compact() == 0
        assert run.root()[0].table("queries").count() == len(ids), "its root is the whole run"
    assert seen == sorted(ids)
    assert len(whole.table("queries").parts()) == len(ids)


def test_a_shard_reads_past_what_a_killed_merge_left(tmp_path: Path) -> None:
    whole = RunDir(tmp_path)
    ids = queries(whole)
    before = {name: whole.read(f"queries/{name}") for name in whole.table("queries").files()}
    whole.table("queries").compact()
    [merged] = whole.table("queries").parts()
    for name, data in before.items():  # it was killed before it deleted them
        whole.write(f"queries/{name}", data)
    whole.write_json(f"queries/{merged}.sources.json", list(before))
    table = RunDir(tmp_path, Shard(1, 1)).table("queries")
    table.clear_merged()
    assert sorted(row["query_id"] for row in table.rows()) == sorted(ids)
    assert len(table.files()) == len(ids) + 2, "the next driver of the whole run deletes them"
