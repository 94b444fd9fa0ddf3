"""Linked files and folders are followed everywhere, read once, and lead into no circle."""

from pathlib import Path

import pytest

from vpo_ray.engines.video.weights import model_identity
from vpo_ray.files.folder import Folder
from vpo_ray.files.input_files import InputError, walk
from vpo_ray.recipe import Queries
from vpo_ray.stages.curate import curate
from vpo_ray.storage.sft_data import sft_rows
from vpo_ray.storage.videos import VideoStore


def counted(path: Path | str | list[str]) -> tuple[list[str], int]:
    """Queries, and all rows that were read."""
    made = curate(Queries(path=str(path) if not isinstance(path, list) else path))
    found = [text for part in made.queries(100) for text in part["query"].to_pylist()]
    return sorted(found), made.counts().total()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a file, a linked file, a linked folder, second names of both, and circles."""
    outside, data = tmp_path / "outside", tmp_path / "data"
    (outside / "deep").mkdir(parents=True)
    (data / "own").mkdir(parents=True)
    (outside / "deep/c.txt").write_text("three\n", "utf-8")
    (outside / "b.txt").write_text("two\n", "utf-8")
    (data / "own/a.txt").write_text("one\n", "utf-8")
    (data / "b.txt").symlink_to(outside / "b.txt")
    (data / "b-again.txt").symlink_to(outside / "b.txt")
    (data / "linked").symlink_to(outside / "deep")
    (data / "linked-again").symlink_to(outside / "deep")
    (data / "aaa").symlink_to("own")
    (data / "own/up").symlink_to("..")
    (data / "own/here").symlink_to(".")
    (data / "itself").symlink_to("itself")
    (outside / "deep/back").symlink_to(data)
    return data


def test_queries_are_found_behind_links_and_read_once(data: Path, tmp_path: Path) -> None:
    everything = (["one", "three", "two"], 3)
    assert counted(data) == everything
    for pattern in (f"{data}/**", f"{data}/**/*.txt", data.as_uri(), f"{data.as_uri()}/**"):
        assert counted(pattern) == everything, pattern
    (tmp_path / "all").symlink_to(data)
    assert counted(tmp_path / "all") == everything
    assert counted([str(data), str(tmp_path / "all"), str(data / "own/a.txt")]) == everything


def test_sft_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/s.jsonl").write_text('{"query": "a", "prompt": "b"}\n', "utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").symlink_to(tmp_path / "far")
    (tmp_path / "s.jsonl").symlink_to("far/s.jsonl")
    for name in ("data", "s.jsonl", "*.jsonl"):
        assert len(list(sft_rows(str(tmp_path / name)))) == 1


def test_a_link_to_nothing_is_told_where_data_is_meant(data: Path) -> None:
    (data / "README").symlink_to("nothing")
    assert counted(data)[1] == 3
    (data / "d.jsonl").symlink_to("nothing")
    for path in (data, data / "d.jsonl", f"{data}/*.jsonl"):
        with pytest.raises(InputError, match=r"d\.jsonl"):
            counted(path)


def test_a_walk_ends_whatever_links_there_are(data: Path) -> None:
    names = {str(path.relative_to(data)) for path in walk(data) if path.is_file()}
    assert names == {"own/a.txt", "b.txt", "b-again.txt", "linked/c.txt"}
    every = {str(path.relative_to(data)) for path in walk(data, every_name=True) if path.is_file()}
    assert {"own/a.txt", "aaa/a.txt", "linked/c.txt", "linked-again/c.txt"} <= every
    assert len(every) < 20


def test_a_run_directory_and_a_video_store_with_linked_folders(tmp_path: Path) -> None:
    key = "ab" + "0" * 30
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one/ab").symlink_to(tmp_path / "two")
    (tmp_path / "two/circle").symlink_to(tmp_path / "one")
    (tmp_path / f"two/{key}.mp4").write_bytes(b"x")
    assert [name.rsplit("/", 1)[-1] for name in Folder(tmp_path / "one").files()] == [f"{key}.mp4"]
    assert [entry.key for entry in VideoStore(tmp_path / "one").entries()] == [key]
    assert Folder(tmp_path / "none").files() == []


def test_a_models_linked_weights_count(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"first")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}", "utf-8")
    (tmp_path / "model/transformer").symlink_to(weights)
    before = model_identity(str(tmp_path / "model"), None)
    (weights / "model.safetensors").write_bytes(b"other")
    assert model_identity(str(tmp_path / "model"), None) != before
