"""A table's folder holds Parquet parts alone, so that any reader of Parquet opens a run's tables."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow.dataset as pads
import pytest

from vpo_ray.files.folder import Folder
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.phases import curate_queries
from vpo_ray.loop.policies import LoopError, training_rows
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row
from vpo_ray.storage.run_dir import TABLES, RunDir
from vpo_ray.storage.sft_data import distinct
from vpo_ray.storage.tables import Table

ROOT = Path(__file__).parents[2]


def read_by_others(folder: Path, key: str) -> list[set[str]]:
    """The keys that pandas, pyarrow and DuckDB find in a table's folder."""
    found = [
        set(pandas.read_parquet(folder)[key]),
        set(pads.dataset(folder, format="parquet").to_table([key])[key].to_pylist()),
    ]
    if importlib.util.find_spec("duckdb"):
        import duckdb

        found.append({row[0] for row in duckdb.sql(f"SELECT {key} FROM '{folder}/*'").fetchall()})
    return found


def check_tables(run: RunDir) -> set[str]:
    """Every table that is there is read by all; their names."""
    names = {name for name in TABLES if Path(run.at(name)).is_dir()}
    for name in names:
        schema_key = TABLES[name][1]
        assert {Path(file).suffix for file in run.table(name).files()} == {".parquet"}
        for keys in read_by_others(Path(run.at(name)), schema_key):
            assert keys == run.table(name).keys() != set()
    return names


def scored(query: str, k: int, score: float) -> Row:
    return {
        "candidate_id": f"{query}-{k}",
        "query_id": query,
        "query": query,
        "k": k,
        "seed": k,
        "prompt": f"prompt {k}",
        "verdict": "aligned",
        "score": score,
        "answers": [{"question": 0, "yes": score > 1}],
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    sets = ["pair.margin=0.5", "queries.near_duplicates=null", f"sft.data={ROOT / 'vpo_ray/data/sft.jsonl'}"]
    return load(
        ROOT / "jobs/recipes/tiny.yaml",
        [f"out={tmp_path / 'run'}", f"queries.path={ROOT / 'vpo_ray/data/queries.jsonl'}", *sets],
    )


@pytest.fixture
def run(recipe: Recipe) -> RunDir:
    """Curated, scored, paired, and with the rows of SFT."""
    run = open_run(recipe)
    curate_queries(recipe, run)
    rows, again = distinct(training_rows(recipe, run))
    run.table("sft").replace(rows)
    run.write_json("meta/sft.json", {"duplicate": again})
    for number in range(20):
        run.table("feedback").append([scored(f"{number:032x}", k, float(k)) for k in range(2)])
    make_pairs(recipe, run)
    return run


def test_every_table_is_read_by_others(run: RunDir) -> None:
    assert check_tables(run) >= {"queries", "sft", "feedback", "pairs"}


def test_a_compaction_that_was_killed_disturbs_no_reader(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", killed)
        with pytest.raises(Killed):
            run.table("feedback").compact(fewest=2)
    assert run.files(".sources.json"), "the kill came between the merged part and the end of its sources"
    Path(run.at("feedback/.part.parquet.0123.tmp")).write_bytes(b"half of a part")
    for keys in read_by_others(Path(run.at("feedback")), "candidate_id"):
        assert keys == run.table("feedback").keys()
    run.table("feedback").compact(fewest=2)
    assert run.files(".sources.json") == []
    assert len(run.table("feedback").parts()) == 1


def test_a_run_of_an_earlier_version_goes_on(recipe: Recipe, run: RunDir) -> None:
    """It had its notes within the tables' folders."""
    before, ids = build_ledger(run, recipe), run.table("queries").keys()
    paired = run.read_json("meta/pairs.json")
    earlier = {
        "queries/curated.json": run.read_json("meta/queries.json"),
        "sft/dropped.json": run.read_json("meta/sft.json"),
        "pairs/reasons.json": paired["reasons"],
        "pairs/videos.json": paired["videos"],
    }
    for name in ("queries", "sft", "pairs"):
        run.delete(f"meta/{name}.json")
    for name, value in earlier.items():
        run.write_json(name, value)
    again = open_run(recipe)
    assert not any(again.exists(name) for name in earlier)
    assert json.loads(again.read("meta/pairs.json")) == paired
    gone = recipe.model_copy(update={"queries": recipe.queries.model_copy(update={"path": "gone.txt"})})
    curate_queries(gone, again)  # it is done: nothing is read
    assert again.table("queries").keys() == ids
    assert build_ledger(again, recipe) == before
    check_tables(again)


def test_pairs_stay_where_none_are_found(recipe: Recipe, run: RunDir) -> None:
    pairs = run.table("pairs").keys()
    strict = recipe.model_copy(update={"pair": recipe.pair.model_copy(update={"margin": 9.0})})
    counted = r"(?s)no preference pairs.*40 candidates with verdict aligned.*20 margin too small"
    with pytest.raises(LoopError, match=counted):
        make_pairs(strict, run)
    assert run.table("pairs").keys() == pairs != set()
    assert run.read_json("meta/pairs.json")["reasons"]["margin too small"] == 20


def test_of_a_candidate_that_was_tried_again_the_good_row_is_paired(recipe: Recipe, run: RunDir) -> None:
    pairs = run.table("pairs").keys()
    run.table("feedback").append([{**scored("0" * 32, 1, 1.0), "score": None, "error": "boom"}])
    make_pairs(recipe, run)
    assert run.table("pairs").keys() == pairs


def test_pairing_and_the_ledger_read_the_feedback_once(
    recipe: Recipe, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    batches = Table.batches

    def noted(table: Table, columns: Any = None, *arguments: Any, **more: Any) -> Any:
        if "prompt" in columns:  # what rows cost is looked up beside, in one narrow column
            read.append(table.uri)
        return batches(table, columns, *arguments, **more)

    monkeypatch.setattr(Table, "batches", noted)
    make_pairs(recipe, run)
    assert read.count(run.at("feedback")) == 1
    build_ledger(run, recipe)
    assert read.count(run.at("feedback")) == 2
