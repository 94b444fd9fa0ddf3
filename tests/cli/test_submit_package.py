"""What `vpo submit` packs: the working directory as Ray would, and every file here that the recipe names."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_ray.cli import submit_package
from vpo_ray.cli.submit_package import MOST_BYTES, PackageError, is_node_of, on_shared_storage, write_package
from vpo_ray.recipe import load

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"


class Work:
    """A working directory with a recipe that names nothing else in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, yaml.safe_load(TINY.read_text("utf-8"))
        self.set("queries", path="s3://bucket/q.jsonl")
        self.set("sft", data="s3://bucket/sft.jsonl")
        for section, model in (("policy", "a/b"), ("judge", "c/d"), ("render", "e/f"), ("reward", "g/h")):
            self.set(section, model=model)
        self.set("reward", checklist={"file": "https://example.org/list.yaml"})

    def set(self, section: str, **keys: Any) -> None:
        self.tree[section] |= keys

    def write(self, name: str, data: str | bytes = "x") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def pack(self, name: str = "recipe.yaml", everywhere: bool = False) -> list[str]:
        path = self.write(name, yaml.safe_dump(self.tree))
        target = self.folder.parent / "package.zip"
        write_package(load(path), path, self.folder, target, lambda _: everywhere)
        with zipfile.ZipFile(target) as package:
            assert package.testzip() is None
            return sorted(package.namelist())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    folder = tmp_path.resolve() / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Work(folder)


def test_what_ignore_files_and_our_list_leave_out_travels_if_named(work: Work) -> None:
    work.write(".gitignore", "data/\n*.local.yaml\n*.txt\n")
    work.write("data/queries.jsonl")
    work.write("data/other.jsonl")
    work.write("runs/sft.jsonl")
    work.write("prompt.txt")
    work.write("lists/.gitignore", "*\n")
    work.write("lists/words")
    work.write(".venv/e.jsonl")
    work.write("runs/policy/config.json")
    work.write("runs/policy/model.safetensors")
    work.set("queries", path=["data/queries.jsonl"], rules={"keywords": "./lists/words"})
    work.set("sft", data="runs/sft.jsonl")
    work.set("policy", model="runs/policy", task_prompt="prompt.txt")
    work.tree["draft"] = {"examples": ".venv/e.jsonl"}
    assert work.pack("mine.local.yaml") == [
        ".gitignore",
        ".venv/e.jsonl",
        "data/queries.jsonl",
        "lists/words",
        "mine.local.yaml",
        "prompt.txt",
        "runs/policy/config.json",
        "runs/policy/model.safetensors",
        "runs/sft.jsonl",
    ]


def test_images_that_rows_name_travel_with_their_file(work: Work, tmp_path: Path) -> None:
    """Else the job drops these rows."""
    work.write(".gitignore", "data/\n")
    work.write("data/pictures/a.png")
    work.write("data/pictures/b c.png")
    work.write("data/other.png")
    work.write("shared/c.png")
    rows = [
        "pictures/a.png",
        "./pictures/b c.png",
        "../shared/c.png",
        "none.png",
        "https://e.org/d.png",
        "",
        5,
    ]
    text = "".join(json.dumps({"query": "q", "image": image}) + "\n" for image in [*rows, None])
    work.write("data/q.jsonl", text + "no JSON\n")
    work.write("data/s.jsonl", json.dumps({"query": "q", "prompt": "p", "picture": "pictures/a.png"}) + "\n")
    work.set("queries", path="data/q.jsonl", image_column="image")
    expected = ["data/pictures/a.png", "data/pictures/b c.png", "data/q.jsonl", "recipe.yaml", "shared/c.png"]
    assert [name for name in work.pack() if name != ".gitignore"] == expected
    work.tree["evaluate"] = {
        "sets": {"s": {"path": "data/s.jsonl", "image_column": "picture"}},
        "policies": ["query"],
    }
    work.set("queries", path="s3://bucket/q.jsonl")
    assert "data/pictures/a.png" in work.pack()
    outside = work.folder.parent / "outside.png"
    outside.write_bytes(b"x")
    for image, says in (("../../outside.png", "leads out of the working"), (str(outside), "of this machine")):
        work.write("data/q.jsonl", json.dumps({"query": "q", "image": image}) + "\n")
        work.set("queries", path="data/q.jsonl")
        with pytest.raises(PackageError, match=rf"queries\.path: the image .*outside\.png of a row .*{says}"):
            work.pack()
    assert "data/q.jsonl" in work.pack(everywhere=True)


@pytest.mark.parametrize("obeyed", [True, False])
def test_the_rest_is_what_ray_packs(work: Work, monkeypatch: pytest.MonkeyPatch, obeyed: bool) -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    if not obeyed:
        monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    work.write(".gitignore", "*.log\n!kept.log\nscratch/\n/top.txt\n# a comment\n")
    work.write(".rayignore", "big\n")
    work.write("code/.gitignore", "secret*\n")
    names = ["a.log", "kept.log", "scratch/x", "top.txt", "code/top.txt", "code/secret.py", "code/main.py"]
    for name in [
        *names,
        "big/x",
        ".git/config",
        "venv/x",
        "code/__pycache__/x",
        "runs/x",
        "a.mp4",
        "dir/.env",
    ]:
        work.write(name)
    (work.folder / "empty").mkdir()
    (work.folder / "none").symlink_to("nothing")
    outside = work.folder.parent / "outside"
    outside.mkdir()
    (outside / "x").write_text("x", "utf-8")
    (work.folder / "linked").symlink_to(outside)
    packed = work.pack()
    excludes = [*ray_constants.get_runtime_env_default_excludes(), *submit_package.EXCLUDES]
    target = work.folder.parent / "ray.zip"
    packaging.create_package(str(work.folder), target, include_gitignore=obeyed, excludes=excludes)
    with zipfile.ZipFile(target) as package:
        assert packed == sorted(package.namelist())
    assert "linked/x" in packed


def test_links_that_lead_back_end(work: Work) -> None:
    work.write("a/x")
    (work.folder / "a/up").symlink_to("..")
    (work.folder / "b").symlink_to("a")
    (work.folder / "itself").symlink_to("itself")
    assert work.pack() == ["a/x", "b/x", "recipe.yaml"]


def test_folders_globs_and_links_that_a_recipe_names(work: Work) -> None:
    work.write(".gitignore", "*\n")
    for name in ("set/data-0.arrow", "set/state.json", "more/a.jsonl", "more/b.jsonl", "more/c.txt"):
        work.write(name)
    store = work.folder.parent / "store"
    store.mkdir()
    (store / "sft.jsonl").write_text("far away", "utf-8")
    (work.folder / "sft.jsonl").symlink_to(store / "sft.jsonl")
    work.set("queries", path=["set", "more/*.jsonl"])
    work.set("sft", data="sft.jsonl")
    named = ["more/a.jsonl", "more/b.jsonl", "recipe.yaml", "set/data-0.arrow", "set/state.json", "sft.jsonl"]
    assert work.pack() == named
    with zipfile.ZipFile(work.folder.parent / "package.zip") as package:
        assert package.read("sft.jsonl") == b"far away"


def test_a_file_of_the_current_directory_travels_to_where_the_job_looks(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = work.folder.parent / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data/q.jsonl").write_text("x", "utf-8")
    monkeypatch.chdir(elsewhere)
    work.set("queries", path="data/q.jsonl")
    assert work.pack() == ["data/q.jsonl", "recipe.yaml"]


def test_a_working_directory_above_the_current_one(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.write("here/data/q.jsonl")
    work.write("here/.gitignore", "data\n")
    monkeypatch.chdir(work.folder / "here")
    work.set("queries", path="data/q.jsonl")
    assert "data/q.jsonl" in work.pack("here/recipe.yaml")


def test_a_glob_of_all_folders_gives_each_file_once(work: Work) -> None:
    work.write(".gitignore", "data\n")
    work.write("data/a/q.jsonl")
    (work.folder / "data/a/up").symlink_to("..")
    work.set("queries", path="data/**/*.jsonl")
    assert work.pack() == [".gitignore", "data/a/q.jsonl", "recipe.yaml"]


def test_what_cannot_travel_is_refused_by_name(work: Work) -> None:
    outside = work.folder.parent / "sft.jsonl"
    outside.write_text("x", "utf-8")
    inside = work.write("q.jsonl")
    work.write("blocked words")
    with work.write("large.jsonl").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    work.set(
        "queries",
        path=[str(inside), "../sft.jsonl"],
        rules={"keywords": (work.folder / "blocked words").as_uri()},
    )
    work.set("sft", data=str(outside))
    work.tree["draft"] = {"examples": "large.jsonl"}
    with pytest.raises(PackageError) as caught:
        work.pack()
    told = str(caught.value).split("\n")[1:]
    assert len(told) == 5
    for key, says in {
        f"queries.path: {inside}": "working directory, q.jsonl",
        "queries.path: ../sft.jsonl": "leads out of the working directory",
        "queries.rules.keywords: file://": "working directory, blocked words",
        f"sft.data: {outside}": "storage that every node has",
        "draft.examples: large.jsonl has 100 MiB": "storage that every node has",
    }.items():
        assert any(line.strip().startswith(key) and says in line for line in told), (key, told)


def test_a_path_that_is_the_same_on_the_cluster_stays_where_it_is(work: Work) -> None:
    outside = work.folder.parent / "sft.jsonl"
    outside.write_text("x", "utf-8")
    work.set("sft", data=str(outside))
    work.set("queries", path="/no/such/path/here.jsonl")
    assert work.pack(everywhere=True) == ["recipe.yaml"]


def test_more_than_ray_takes_is_refused_with_the_largest_files(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.runtime_env import packaging

    work.write("large.bin", os.urandom(5000))
    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 4000)
    with pytest.raises(PackageError, match=r"large\.bin.*storage that every node has"):
        work.pack()


def test_equal_files_are_one_package(work: Work) -> None:
    script = work.write("run.sh", "true")
    script.chmod(0o755)
    target = work.folder.parent / "package.zip"
    work.pack()
    before = target.read_bytes()
    os.utime(script, (1, 1))
    work.pack()
    assert target.read_bytes() == before
    with zipfile.ZipFile(target) as package:
        assert (package.getinfo("run.sh").external_attr >> 16) & 0o777 == 0o755


def test_which_paths_are_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Mount:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    mounts = [
        Mount("/", "ext4"),
        Mount(str(tmp_path / "net"), "nfs4"),
        Mount(str(tmp_path / "net/in"), "tmpfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert on_shared_storage(str(tmp_path / "net/a/b.jsonl"))
    assert not on_shared_storage(str(tmp_path / "net/in/b.jsonl"))
    assert not on_shared_storage(str(tmp_path / "b.jsonl"))
    assert not is_node_of("session_that_never_was")
