"""Ray Data tasks give what one process gives, however many there are."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import InputError, RulesError, curate, wants_workers, workers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

WORDS = [*"abcdefghij", "the red", "runs under", "big old house", "-ar 16:9", "zoom", "at night", "4k"]


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of other kinds; a fifth of the queries come again, some with a word more."""
    folder = tmp_path_factory.mktemp("queries")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(14))) for _ in range(1500)]
    texts += [f"{text} {rng.choice(('', '', 'now'))}" for text in rng.choices(texts, k=400)]
    rng.shuffle(texts)
    rows = [{"query": text, "unsafe": rng.random() < 0.2} for text in texts]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:900])) + "\nno json\n", "utf-8")
    pq.write_table(pa.Table.from_pylist(rows[900:1600]), folder / "b.parquet")
    (folder / "c.json").write_text(json.dumps([*rows[1600:], None, {}, {"query": 1}]), "utf-8")
    return [str(folder / name) for name in ("a.jsonl", "b.parquet", "c.json")]


def test_one_worker_and_eight_and_none(queries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ROWS_PER_TASK", 150)
    options: dict[str, Any] = {
        "flags": True,
        "rules": {"min_words": 2, "max_digits": 3},
        "near_duplicates": {"threshold": 0.7},
        "size": 300,
        "unsafe_columns": ["unsafe"],
        "unsafe_share": 0.1,
        "splits": {"sft": 1, "dpo": 1, "eval": 1},
    }
    tables = []
    for count in (0, 1, 8):
        curated = curate(Queries(path=queries, workers=count, **options))
        tables.append((pa.concat_tables(curated.queries(50)), pa.concat_tables(curated.dropped(50))))
    assert tables[0][0].num_rows == 300
    assert tables[0][0].num_rows + tables[0][1].num_rows == 1900 + 4
    assert set(tables[0][1]["reason"].to_pylist()) >= {
        "empty", "null", "not JSON", "not text", "no such column", "duplicate", "near duplicate",
        "too few words", "not in the subset",
    }  # fmt: skip
    assert tables[1] == tables[0]
    assert tables[2] == tables[0]


def test_a_file_that_fails_on_a_worker(queries: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.parquet").write_bytes(b"none")
    with pytest.raises(InputError, match=r"q.parquet: not a Parquet file") as caught:
        curate(Queries(path=[*queries, str(tmp_path / "q.parquet")], workers=2))
    assert "\n" not in str(caught.value)
    with pytest.raises(RulesError, match="languages: xx not known"):
        curate(Queries(path=queries, workers=2, rules={"languages": ["xx"]}))


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("", "utf-8")
    (tmp_path / "b.txt").write_text("one\ntwo", "utf-8")
    assert curate(Queries(path=f"{tmp_path}/*.txt", workers=2)).counts() == {"dpo": 2}
    with pytest.raises(InputError, match="holds no rows"):
        curate(Queries(path=f"{tmp_path}/a.txt", workers=2))


def test_small_input_stays_in_this_process(queries: list[str]) -> None:
    assert not wants_workers(Queries(path=queries))
    assert wants_workers(Queries(path=queries, workers=1))
    assert not wants_workers(Queries(path=queries, workers=0))
