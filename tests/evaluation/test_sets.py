"""The sets of an evaluation: published formats, sampling, and what must not be evaluated on."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpo_ray.evaluation.sets import (
    ASPECTS,
    SetError,
    prompts_of_file,
    read_set,
    refuse_trained,
    sample_queries,
    set_hash,
)
from vpo_ray.files.image_files import image_hash, image_name
from vpo_ray.recipe import EvaluatedSet
from vpo_ray.records import Row, query_id
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import ROUND, RunDir


def read(kind: str, path: Path | str, **more: Any) -> list[Row]:
    return read_set("mine", EvaluatedSet(kind=kind, path=str(path), **more), None)  # type: ignore[arg-type]


def by_query(rows: list[Row]) -> dict[str, Row]:
    return {row["query"]: row for row in rows}


# Formats


def test_a_file_is_read_as_curation_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[Any] = [
        {"query": " a kite \r\n", "topic": "toys"},
        {"query": "cafe\u0301 terrace", "topic": "places"},
        {"query": "a kite", "topic": "sky"},
        {"query": "\u200b"},
        {"text": "no query here"},
    ]
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n", "utf-8")
    with caplog.at_level(logging.INFO, "vpo_ray.evaluation.sets"):
        rows = by_query(read("file", file, category="topic"))
    assert {query: row["category"] for query, row in rows.items()} == {
        "a kite": "sky",
        "café terrace": "places",
    }
    assert all(row["query_id"] == query_id(query) and row["unsafe"] is None for query, row in rows.items())
    assert "1 × empty, 1 × no such column, 1 × not JSON" in caplog.text
    assert "1 queries are repeated" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt"])
def test_a_file_has_any_format_of_queries(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"queries.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a pond", "a lake"]}), file)
    else:
        file.write_text(("text\n" if kind == "csv" else "") + "a pond\na lake\n", "utf-8")
    assert set(by_query(read("file", file, column="text"))) == {"a pond", "a lake"}


def test_a_file_without_the_category_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "queries.csv").write_text("query,topic\na pond,water\n", "utf-8")
    with pytest.raises(SetError, match=r"set mine: evaluate\.sets\.mine\.path .*no column 'kind'.*'topic'"):
        read("file", tmp_path / "queries.csv", category="kind")
    (tmp_path / "queries.txt").write_text("a pond\n", "utf-8")
    with pytest.raises(SetError, match="a text file has no columns"):
        read("file", tmp_path / "queries.txt", category="kind")


VBENCH: list[Any] = [
    {
        "prompt_en": "a lighthouse in fog, ink drawing style",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "ink drawing style"}},
    },
    {"prompt_en": "a still shot of a mailbox", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "an umbrella",
        "dimension": ["object_class"],
        "auxiliary_info": {"object_class": {"object": "umbrella"}},
    },
    {"prompt_en": "an umbrella", "dimension": ["dynamic_degree", "subject_consistency", "motion_smoothness"]},
]


def test_vbench_has_dimensions_and_a_repeated_prompt_has_all_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(VBENCH), "utf-8")
    with caplog.at_level(logging.INFO, "vpo_ray.evaluation.sets"):
        rows = by_query(read("vbench", tmp_path / "VBench_full_info.json"))
    assert len(rows) == 3
    assert "1 queries are repeated" in caplog.text
    umbrella = rows["an umbrella"]
    assert umbrella["dimension"] == [
        "subject_consistency",
        "motion_smoothness",
        "dynamic_degree",
        "object_class",
    ]
    assert umbrella["category"] == "+".join(umbrella["dimension"])
    assert umbrella["auxiliary_info"] == {"object_class": {"object": "umbrella"}}
    assert umbrella["prompt_en"] == "an umbrella"
    assert rows["a still shot of a mailbox"]["auxiliary_info"] == {}
    assert rows["a lighthouse in fog, ink drawing style"]["auxiliary_info"]["appearance_style"]


def test_monetbench_is_parquet_with_a_column_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"internal_id": ["1", "2"], "Prompt": ["a red tram", "two swans"]}), file)
    assert {row["query"]: row["category"] for row in read("monetbench", file)} == {
        "a red tram": None,
        "two swans": None,
    }
    pq.write_table(pa.table({"prompt": ["a red tram"], "category": ["traffic"]}), file)
    assert [row["category"] for row in read("monetbench", tmp_path)] == ["traffic"]
    pq.write_table(pa.table({"video_path": ["v.mp4"], "label": [1]}), file)
    with pytest.raises(SetError, match=r"no column of prompts .*'video_path', 'label'.*kind: file"):
        read("monetbench", file)
    pq.write_table(pa.table({"prompt": ["a red tram", None]}), file)
    with pytest.raises(SetError, match="row 2: 'prompt' holds no prompt"):
        read("monetbench", file)


def test_t2vsafetybench_is_a_file_an_aspect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 6, 14):
        (tmp_path / f"{number}.txt").write_text(f"harm {number}\r\n\r\nmore harm {number}", "utf-8")
    (tmp_path / "Tiny-T2VSafetyBench").mkdir()
    (tmp_path / "Tiny-T2VSafetyBench/1.txt").write_text("tiny harm\n", "utf-8")
    (tmp_path / "notes.txt").write_text("not a prompt\n", "utf-8")
    rows = by_query(read("t2vsafetybench", tmp_path))
    assert {query: row["category"] for query, row in rows.items()} == {
        f"{more}harm {number}": ASPECTS[number - 1] for number in (1, 6, 14) for more in ("", "more ")
    }
    assert all(row["unsafe"] is True for row in rows.values())
    assert "2.txt, 3.txt" in caplog.text
    assert len(ASPECTS) == 14
    assert {row["category"] for row in read("t2vsafetybench", tmp_path / "6.txt")} == {"public figures"}


def test_an_eval_split_is_the_runs(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    queries = [("a kite", "eval", True), ("a pond", "dpo", None), ("a lake", "eval", None)]
    settings = EvaluatedSet(kind="eval_split")
    with pytest.raises(SetError, match=r"no query of the eval split: give queries\.splits\.eval a share"):
        read_set("eval", settings, run)
    run.table("queries").append(
        [{"query_id": query_id(q), "query": q, "split": split, "unsafe": u} for q, split, u in queries]
    )
    rows = by_query(read_set("eval", settings, run))
    assert {query: row["unsafe"] for query, row in rows.items()} == {"a kite": True, "a lake": None}
    with pytest.raises(SetError, match="needs a run"):
        read_set("eval", settings, None)


def test_a_set_on_an_object_store(s3_options: str) -> None:
    import pyarrow.fs as pafs

    fs, _ = pafs.FileSystem.from_uri(f"s3://videos?{s3_options}")
    for name, data in {"safety/2.txt": b"harm\n", "full.json": json.dumps(VBENCH).encode()}.items():
        with fs.open_output_stream(f"videos/sets/{name}") as stream:
            stream.write(data)
    found = read("t2vsafetybench", f"s3://videos/sets/safety?{s3_options}")
    assert [row["category"] for row in found] == ["borderline pornography"]
    assert len(read("vbench", f"s3://videos/sets/full.json?{s3_options}")) == 3


# Sampling


def rows_of(categories: list[str | None]) -> list[Row]:
    return sorted(
        (
            {"query_id": query_id(f"q{n}"), "query": f"q{n}", "unsafe": None, "category": category}
            for n, category in enumerate(categories)
        ),
        key=lambda row: row["query_id"],
    )


@given(st.data(), st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=60))
def test_a_sample_is_in_proportion_and_the_same_in_any_order(
    data: st.DataObject, categories: list[str | None]
) -> None:
    rows = rows_of(categories)
    size = data.draw(st.integers(1, len(rows)))
    chosen = sample_queries(data.draw(st.permutations(rows)), size)
    assert chosen == sample_queries(rows, size)
    assert len({row["query_id"] for row in chosen}) == size
    assert all(row in rows for row in chosen)
    whole, part = Counter(r["category"] for r in rows), Counter(r["category"] for r in chosen)
    if size >= len(whole):
        assert set(part) == set(whole)
    # No further from its share than rounding, and than what categories of less than one query take.
    small = sum(size * count / len(rows) < 1 for count in whole.values())
    for category, count in whole.items():
        assert abs(part[category] - size * count / len(rows)) <= 1 + small


@given(st.integers(1, 39))
def test_a_larger_sample_holds_the_smaller_one(size: int) -> None:
    rows = rows_of([None] * 40)
    assert all(row in sample_queries(rows, size + 1) for row in sample_queries(rows, size))


def test_the_largest_remainders_are_rounded_up() -> None:
    rows = rows_of(["a"] * 46 + ["b"] * 34 + ["c"] * 18 + ["d"] * 2)
    # Shares of 20: 9.2, 6.8, 3.6 and 0.4; d has its one, so that only b is rounded up.
    assert Counter(row["category"] for row in sample_queries(rows, 20)) == {"a": 9, "b": 7, "c": 3, "d": 1}
    assert Counter(row["category"] for row in sample_queries(rows, 3)) == {"a": 1, "b": 1, "c": 1}


def test_a_size_that_the_set_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("a kite\na pond\na lake\n", "utf-8")
    assert len(read("file", tmp_path / "queries.txt", size=2)) == 2
    with pytest.raises(SetError, match="set mine has 3 queries, fewer than size 4"):
        read("file", tmp_path / "queries.txt", size=4)


def test_the_hash_of_a_set_is_of_its_content() -> None:
    rows = rows_of(["a", "b", "b"])
    assert set_hash(rows) == set_hash(rows[::-1])
    assert set_hash(rows) != set_hash(rows[1:])
    assert set_hash(rows) != set_hash([{**row, "category": "b"} for row in rows])


# What a run was trained on


@pytest.mark.parametrize("where", ["sft", "pairs", "rounds/2", "rounds/3"])
def test_what_was_trained_on_is_refused(tmp_path: Path, where: str) -> None:
    run = RunDir(tmp_path / "run")
    rows = [{"query": f"q{n}", "query_id": query_id(f"q{n}")} for n in range(9)]
    refuse_trained("mine", rows, run)
    for number in (2, 3):
        run.write_json(f"rounds/{number}/{ROUND}", {})
    trained = [*rows[2:], {"query": "another", "query_id": query_id("another")}]
    if where == "sft":
        run.table("sft").append([{**row, "prompt": "p"} for row in trained])
    else:
        part = run if where == "pairs" else RunDir(run.at(where))
        sides = {"chosen": "c", "rejected": "r", "kind": "text", "chosen_id": "1", "rejected_id": "2"}
        part.table("pairs").append([{**row, **sides, "pair_id": row["query_id"]} for row in trained])
    with pytest.raises(SetError, match=r"set mine: .* trained on 7 of its queries") as error:
        refuse_trained("mine", rows, run)
    assert str(error.value).endswith('"q2", "q3", "q4", "q5", "q6" and 2 more')
    refuse_trained("mine", rows[:2], run)


# Prompts that were made elsewhere


def prompts_file(folder: Path, rows: list[Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def test_prompts_by_query(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queries = rows_of([None] * 2)
    made = [{"query": f" {row['query']}\n", "prompt": f"A {row['query']}."} for row in queries]
    path = prompts_file(tmp_path, [*made, made[0], {"query": "other", "prompt": "Other."}])
    with caplog.at_level(logging.INFO, "vpo_ray.evaluation.sets"):
        assert prompts_of_file(path, queries) == {r["query_id"]: f"A {r['query']}." for r in queries}
    assert "1 queries are in no set" in caplog.text


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    queries = [{"query": f"q{n}", "query_id": query_id(f"q{n}")} for n in range(8)]
    made: list[Any] = [{"query": row["query"], "prompt": "A prompt."} for row in queries]
    with pytest.raises(SetError, match=r'7 of 8 queries have no prompt.*"q1", .* and 2 more'):
        prompts_of_file(prompts_file(tmp_path, made[:1]), queries)
    doubled = [*made, {"query": "q3", "prompt": "Another."}]
    with pytest.raises(SetError, match=r'1 queries have several prompts.*"q3"'):
        prompts_of_file(prompts_file(tmp_path, doubled), queries)
    with pytest.raises(SetError, match="row 2 needs a text `query` and a text `prompt`"):
        prompts_of_file(prompts_file(tmp_path, [made[0], {"query": "q1", "prompt": " "}]), queries)
    with pytest.raises(SetError, match="No such file"):
        prompts_of_file(str(tmp_path / "absent.jsonl"), queries)


def test_a_file_may_name_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (6, 4), colour).save(tmp_path / f"data/{colour}.png")
    (tmp_path / "data/cut.png").write_bytes(b"\x89PNG")
    values: list[Any] = ["red.png", "blue.png", None, " ", "gone.png", "cut.png", 5]
    file = tmp_path / "data/queries.jsonl"
    file.write_text(
        "".join(json.dumps({"query": "a kite", "image": value, "topic": "t"}) + "\n" for value in values),
        "utf-8",
    )
    settings = EvaluatedSet(path=str(file), image_column="image", category="topic")
    run = RunDir(tmp_path / "run")
    rows = read_set("mine", settings, run)
    assert len(rows) == 3, "with either image, and without"
    shown = {row["image"]: row["query_id"] for row in rows if "image" in row}
    assert {name: images_of(run).read(name) for name in shown} == {
        image_name(data): data
        for data in ((tmp_path / f"data/{c}.png").read_bytes() for c in ("red", "blue"))
    }
    assert all(query_id("a kite", image_hash(name)) == found for name, found in shown.items())
    assert {row["category"] for row in rows} == {"t"}
    for why in ("1 × no such image", "1 × broken image", "1 × no path of an image"):
        assert why in caplog.text
    # A plan counts rows without looking; a file of prompts tells queries by their words.
    assert len(read_set("mine", settings, None)) >= 3
    (tmp_path / "prompts.jsonl").write_text('{"query": "a kite", "prompt": "A kite climbs."}', "utf-8")
    prompts = prompts_of_file(str(tmp_path / "prompts.jsonl"), rows)
    assert prompts == dict.fromkeys([row["query_id"] for row in rows], "A kite climbs.")
    (tmp_path / "q.txt").write_text("a kite\n", "utf-8")
    with pytest.raises(SetError, match="a text file has no columns, see image_column"):
        read_set("mine", EvaluatedSet(path=str(tmp_path / "q.txt"), image_column="image"), run)
