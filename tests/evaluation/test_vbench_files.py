"""What VBench's command reads and leaves: names of videos, its info file, its results."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.evaluation.samples import SAMPLE
from vpo_ray.evaluation.sets import DIMENSIONS, QUALITY, SEMANTIC, SetError, read_set
from vpo_ray.evaluation.vbench_files import VBenchResults, export_vbench, import_vbench
from vpo_ray.recipe import EvaluatedSet
from vpo_ray.records import Row, content_id, query_id, table
from vpo_ray.storage.videos import VideoStore

# Row of CogVideoX-5B on VBench's leaderboard, in percent; its quality, semantic and total score are 82.75,
# 77.04 and 81.61 there.
PUBLISHED = {
    "subject_consistency": 96.23,
    "background_consistency": 96.52,
    "temporal_flickering": 98.66,
    "motion_smoothness": 96.92,
    "dynamic_degree": 70.97,
    "aesthetic_quality": 61.98,
    "imaging_quality": 62.90,
    "object_class": 85.23,
    "multiple_objects": 62.11,
    "human_action": 99.40,
    "color": 82.81,
    "spatial_relationship": 66.35,
    "scene": 53.20,
    "appearance_style": 24.91,
    "temporal_style": 25.38,
    "overall_consistency": 27.59,
}


def sample(query: str, policy: str = "dpo", seed: int = 0, **more: Any) -> Row:
    row = {
        "sample_id": content_id(query, policy, seed, more.get("video_model")),
        "set": "vb",
        "policy": policy,
        "video_model": "render",
        "query_id": query_id(query),
        "query": query,
        "seed": seed,
        "prompt": f"{query}, rewritten",
        **more,
    }
    return table([row], SAMPLE).to_pylist()[0]


def rendered(store: VideoStore, row: Row) -> Row:
    key = content_id(row["sample_id"])
    store.write(key, f"video of {row['sample_id']}".encode(), {})
    return {**row, "video_key": key, "video_uri": store.uri(key)}


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore(tmp_path / "store")


def vbench_rows(folder: Path) -> list[Row]:
    entries = [
        {"prompt_en": "a person is rowing ", "dimension": ["human_action"]},
        {
            "prompt_en": "a blue teapot",
            "dimension": ["color"],
            "auxiliary_info": {"color": {"color": "blue"}},
        },
        {"prompt_en": "nobody rendered this", "dimension": ["scene"]},
    ]
    (folder / "full.json").write_text(json.dumps(entries), "utf-8")
    return read_set("vb", EvaluatedSet(kind="vbench", path=str(folder / "full.json")), None)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Export


def test_videos_have_the_names_that_vbench_looks_for(tmp_path: Path, store: VideoStore) -> None:
    rows = vbench_rows(tmp_path)
    samples = [
        rendered(store, sample(query, policy, seed))
        for query in ("a person is rowing", "a blue teapot")
        for policy in ("query", "dpo")
        for seed in (0, 1)
    ]
    assert export_vbench(samples, rows, str(tmp_path / "out")) == {"written": 8, "left_out": 0}
    # The query as it is published, with its space at the end; never the prompt that was rendered.
    assert listing(tmp_path / "out/vb") == sorted(
        [
            f"render/{policy}/{query}-{seed}.mp4"
            for policy in ("query", "dpo")
            for query in ("a person is rowing ", "a blue teapot")
            for seed in (0, 1)
        ]
        + ["manifest.json", "vbench_full_info.json"]
    )
    for row in samples:
        name = f"{row['query']}{' ' * (row['query'] == 'a person is rowing')}-{row['seed']}.mp4"
        copied = (tmp_path / "out/vb/render" / row["policy"] / name).read_bytes()
        assert copied == f"video of {row['sample_id']}".encode()
    info = json.loads((tmp_path / "out/vb/vbench_full_info.json").read_text("utf-8"))
    assert sorted(info, key=lambda entry: entry["prompt_en"]) == [
        {
            "prompt_en": "a blue teapot",
            "dimension": ["color"],
            "auxiliary_info": {"color": {"color": "blue"}},
        },
        {"prompt_en": "a person is rowing ", "dimension": ["human_action"]},
    ]
    assert export_vbench(samples, rows, str(tmp_path / "out"))["written"] == 8
    manifest = json.loads((tmp_path / "out/vb/manifest.json").read_text("utf-8"))
    assert {entry["file"] for entry in manifest["videos"]} == {
        name for name in listing(tmp_path / "out/vb") if name.endswith(".mp4")
    }


def test_what_has_no_video_or_no_name_is_left_out_with_its_reason(tmp_path: Path, store: VideoStore) -> None:
    long = "ab" * 124  # 248 bytes, and 6 of "-0.mp4"
    samples = [
        rendered(store, sample(query))
        for query in (
            "either/or",
            "../../../escape",
            "/etc/passwd",
            "..",
            long,
            long + "cd",
            "好" * 90,
            "a\nb",
        )
    ]
    damaged, gone = rendered(store, sample("damaged")), rendered(store, sample("gone"))
    Path(store.uri(damaged["video_key"])).write_bytes(b"other bytes")
    os.remove(store.uri(gone["video_key"]))
    failed = sample("failed", error="out of memory", error_stage="render")
    unsafe = sample("unsafe", skipped="unsafe: not rendered")
    counts = export_vbench([*samples, damaged, gone, failed, unsafe], [], str(tmp_path / "out/here"))
    assert counts == {"written": 3, "left_out": 9}
    assert set(listing(tmp_path / "out")) == {
        "here/vb/manifest.json",
        *(f"here/vb/render/dpo/{query}-0.mp4" for query in ("..", long, "a\nb")),
    }
    why = {
        entry["query"]: entry["why"]
        for entry in json.loads((tmp_path / "out/here/vb/manifest.json").read_text("utf-8"))["left_out"]
    }
    for query in ("either/or", "../../../escape", "/etc/passwd"):
        assert why[query].startswith("the query cannot be the name of a file")
    for query in (long + "cd", "好" * 90):
        assert "255 fit" in why[query]
    assert why["failed"] == "out of memory"
    assert why["unsafe"] == "unsafe: not rendered"
    assert "bytes" in why["damaged"]
    assert why["gone"].startswith("no ")


def test_videos_of_another_export_are_not_left_to_vbench(tmp_path: Path, store: VideoStore) -> None:
    first, second = (rendered(store, sample("a kite", seed=seed)) for seed in (0, 1))
    export_vbench([first, second], [], str(tmp_path / "out"))
    before = listing(tmp_path / "out")
    with pytest.raises(SetError, match=r"1 videos of another export.*'render/dpo/a kite-1\.mp4'"):
        export_vbench([first], [], str(tmp_path / "out"))
    assert listing(tmp_path / "out") == before
    with pytest.raises(SetError, match="no sample to export"):
        export_vbench([], [], str(tmp_path / "none"))


def test_an_export_between_object_stores(tmp_path: Path, s3_options: str) -> None:
    store = VideoStore(f"s3://videos/vbench-store?{s3_options}")
    row = rendered(store, sample("a kite"))
    to = f"s3://videos/vbench-out?{s3_options}"
    assert export_vbench([row], [], to)["written"] == 1
    assert VideoStore(to).folder.read("vb/render/dpo/a kite-0.mp4") == store.read(row["video_key"])


# Import


def results_file(folder: Path, content: Any, name: str = "results_1") -> str:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}_eval_results.json"
    file.write_text(json.dumps(content), "utf-8")
    return str(file)


def entry(row: Row, value: Any, above: str = "/data/out/vb/render/") -> dict[str, Any]:
    return {
        "video_path": f"{above}{row['policy']}/{row['query']}-{row['seed']}.mp4",
        "video_results": value,
        "frame_results": [0.5],
    }


def test_results_come_back_to_their_samples(tmp_path: Path) -> None:
    samples = [
        sample(query, policy, seed)
        for query in ("a kite", "a well-known bridge", "a-1")
        for policy in ("query", "dpo")
        for seed in (0, 1)
    ]
    mine = [row for row in samples if row["policy"] == "dpo"]
    content = {
        "imaging_quality": [0.6, [entry(row, 60 + n) for n, row in enumerate(mine)]],
        "human_action": [0.5, [entry(row, True) for row in mine]],
        "scene": [0.25, [entry(mine[0], float("nan")), entry(mine[1], 0.25)]],
    }
    (found,) = import_vbench(results_file(tmp_path, content), samples)
    assert (found.set, found.video_model, found.policy) == ("vb", "render", "dpo")
    assert found.means == {"imaging_quality": 0.6, "human_action": 0.5, "scene": 0.25}
    assert set(found.measures) == {row["sample_id"] for row in mine}
    for n, row in enumerate(mine):
        # What was 0..100 is 0..1; of an action behind a `-`, VBench read a part only.
        expected = {"vbench_imaging_quality": pytest.approx((60 + n) / 100)}
        if "-" not in row["query"]:
            expected["vbench_human_action"] = 1.0
        if n == 1:
            expected["vbench_scene"] = 0.25
        assert found.measures[row["sample_id"]] == expected
    assert found.total is None


def test_the_mean_of_older_versions_is_put_right_too(tmp_path: Path) -> None:
    row = sample("a kite")
    (found,) = import_vbench(results_file(tmp_path, {"imaging_quality": [62.9, [entry(row, 62.9)]]}), [row])
    assert found.means == {"imaging_quality": pytest.approx(0.629)}


def test_dimensions_in_files_of_their_own(tmp_path: Path) -> None:
    rows = [sample("a kite", policy) for policy in ("query", "dpo")]
    for row in rows:
        for dimension, percent in PUBLISHED.items():
            content = {dimension: [percent / 100, [entry(row, percent / 100)]]}
            results_file(tmp_path / "results", content, f"{row['policy']}_{dimension}")
    (tmp_path / "results/x_full_info.json").write_text("[]", "utf-8")
    found = import_vbench(str(tmp_path / "results"), rows)
    assert [one.policy for one in found] == ["dpo", "query"]
    assert [one.total for one in found] == [pytest.approx(0.8161, abs=1e-4)] * 2
    results_file(tmp_path / "results", {"scene": [0.1, [entry(rows[0], 0.1)]]}, "again")
    with pytest.raises(SetError, match="scene of vb/render/query is in another file too"):
        import_vbench(str(tmp_path / "results"), rows)


def test_the_total_is_vbenchs() -> None:
    means = {dimension: percent / 100 for dimension, percent in PUBLISHED.items()}
    whole = VBenchResults("vb", "render", "dpo", means)
    assert whole.total == pytest.approx(0.8161, abs=1e-4)
    assert whole._score(QUALITY) == pytest.approx(0.8275, abs=1e-4)
    assert whole._score(SEMANTIC) == pytest.approx(0.7704, abs=1e-4)


@given(st.sets(st.sampled_from(DIMENSIONS), max_size=15))
def test_there_is_no_total_of_fewer_than_sixteen(some: set[str]) -> None:
    assert len(DIMENSIONS) == 16
    assert VBenchResults("vb", "render", "dpo", dict.fromkeys(some, 0.5)).total is None


def test_a_video_of_two_samples_is_of_neither(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [sample("a kite"), sample("a kite", video_model="wan")]
    videos = [entry(rows[0], 0.5, above=""), entry(rows[0], 0.5, above="render/")]
    (found,) = import_vbench(results_file(tmp_path, {"scene": [0.5, videos]}), rows)
    assert set(found.measures) == {rows[0]["sample_id"]}
    assert "1 of 2 videos are not of this evaluation" in caplog.text


SCENE = [0.5, [{"video_path": "/data/out/vb/render/dpo/a kite-0.mp4", "video_results": 0.5}]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"expected \{dimension"),
        ({}, r"expected \{dimension"),
        ([{"prompt_en": "a kite", "dimension": ["scene"]}], r"expected \{dimension"),
        ({"Human_Anatomy": SCENE}, "'Human_Anatomy' is no dimension of VBench"),
        ({"scene": 0.5}, "scene: expected"),
        ({"scene": [0.5]}, "scene: expected"),
        ({"scene": [0.5, [{"video_path": "x"}]]}, "scene: expected"),
        ({"scene": [0.5, [{"video_path": 3, "video_results": 0.5}]]}, "scene: .* is no number"),
        ({"scene": [None, SCENE[1]]}, "scene: None is no number"),
        ({"scene": [0.5, []]}, "none of its 0 videos"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SetError, match=message):
        import_vbench(results_file(tmp_path, content), [sample("a kite")])


@pytest.mark.parametrize(
    "path",
    [
        "/x/vb/render/dpo/a dog-0.mp4",
        "/x/vb/render/dpo/a kite-1.mp4",
        "/x/vb/render/dpo/a kite-0.gif",
        "/x/other/render/dpo/a kite-0.mp4",
        "filtered_videos/a kite-0.mp4",
        "a kite-0.mp4",
        "vb/render/dpo/\ud800-0.mp4",
        "",
    ],
)
def test_results_of_other_videos_are_refused(tmp_path: Path, path: str) -> None:
    content = {"scene": [0.5, [{"video_path": path, "video_results": 0.5}]]}
    with pytest.raises(SetError, match="none of its 1 videos is of this evaluation"):
        import_vbench(results_file(tmp_path, content), [sample("a kite")])


def test_results_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    rows = [sample("a kite")]
    (tmp_path / "broken.json").write_text('{"scene": [0.5,', "utf-8")
    with pytest.raises(SetError, match=r"broken\.json: not JSON"):
        import_vbench(str(tmp_path / "broken.json"), rows)
    (tmp_path / "other.json").write_text("{}", "utf-8")
    with pytest.raises(SetError, match="no file is called <name>_eval_results"):
        import_vbench(str(tmp_path), rows)
    with pytest.raises(SetError, match=r"absent\.json: No such file"):
        import_vbench(str(tmp_path / "absent.json"), rows)
    both = [sample("a kite"), sample("a kite", "query")]
    content = {"scene": [0.5, [entry(row, 0.5) for row in both]]}
    with pytest.raises(SetError, match="scene is of several folders"):
        import_vbench(results_file(tmp_path / "new", content), both)
