"""`vpo videos`: what it lists, what it finds damaged, and that nothing goes unless it is told to."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vpo_ray import cli
from vpo_ray.cli.videos import excerpt, size
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore

KEYS = [f"{name}{name}" + "0" * 30 for name in "abcd"]
SHAPE = {"frames": 49, "width": 720, "height": 480, "fps": 8.0}
OLD = 40 * 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    """Two old videos, one of today, and what an interrupted write left long ago."""
    store = VideoStore(tmp_path / "store")
    for key, prompt in zip(
        KEYS, ("a cat", "a \x1b[31mred\x1b[0m\ndog \u202e", "x" * 500, "half"), strict=True
    ):
        store.write(key, key.encode() * 1000, {"prompt": prompt, **SHAPE})
    at(store, KEYS[3], "json").unlink()
    for key in (KEYS[0], KEYS[1], KEYS[3]):
        age(store, key, OLD)
    return store


@pytest.fixture
def vpo(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> tuple[int, str, str]:
        status = cli.main(["videos", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def at(store: VideoStore, key: str, kind: str = "mp4") -> Path:
    return Path(store.uri(key)).with_suffix(f".{kind}")


def age(store: VideoStore, key: str, seconds: float) -> None:
    for kind in ("mp4", "json"):
        if at(store, key, kind).exists():
            now = at(store, key, kind).stat().st_mtime
            os.utime(at(store, key, kind), (now - seconds, now - seconds))


def keys(store: VideoStore) -> list[str]:
    return [entry.key for entry in store.entries()]


def run_naming(folder: Path, *named: str) -> RunDir:
    run = RunDir(folder)
    run.write("recipe.yaml", b"{}")
    row = {"candidate_id": "c", "query_id": "q", "query": "a cat", "k": 0, "seed": 0}
    run.table("feedback").append([row])
    run.table("renders").append([{**row, "candidate_id": key, "video_key": key} for key in named])
    return run


def test_ls(store: VideoStore, vpo: Any) -> None:
    status, out, _ = vpo("ls", store.folder.uri)
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines] == [*KEYS, "4"]
    assert "49 x 720 x 480" in lines[0]
    assert lines[0].endswith("a cat")
    assert "incomplete" in lines[3]
    assert "4 videos, " in lines[-1]
    assert "1 of them incomplete" in lines[-1]
    assert max(map(len, lines[:4])) < 140


def test_a_prompt_cannot_move_the_cursor(store: VideoStore, vpo: Any) -> None:
    for arguments in (["ls", store.folder.uri], ["ls", store.folder.uri, "--json"]):
        _, out, _ = vpo(*arguments)
        assert all(c.isprintable() or c == "\n" for c in out)
        assert "red" in out
    assert json.loads(out)["videos"][1]["prompt"] == "a \x1b[31mred\x1b[0m\ndog \u202e"


def test_ls_as_json(store: VideoStore, vpo: Any) -> None:
    status, out, _ = vpo("ls", store.folder.uri, "--json")
    listed = json.loads(out)
    assert status == 0
    assert [video["key"] for video in listed["videos"]] == KEYS
    assert (listed["count"], listed["bytes"]) == (4, sum(entry.size for entry in store.entries()))
    assert listed["videos"][0]["frames"] == 49
    assert listed["videos"][3]["prompt"] is None


def test_verify(store: VideoStore, vpo: Any) -> None:
    status, out, _ = vpo("verify", store.folder.uri)
    assert (status, out.splitlines()[-1]) == (1, "4 videos read, 1 damaged or incomplete")
    at(store, KEYS[0]).write_bytes(b"x" * 32000)
    at(store, KEYS[2]).write_bytes(b"")
    status, out, _ = vpo("verify", store.folder.uri, "--json")
    assert status == 1
    assert [bad["key"] for bad in json.loads(out)["damaged"]] == [KEYS[0], KEYS[2], KEYS[3]]
    assert keys(store) == KEYS, "nothing goes without --delete"
    status, out, _ = vpo("verify", store.folder.uri, "--delete")
    assert (status, out.splitlines()[-1]) == (1, "4 videos read, 3 damaged or incomplete, 3 deleted")
    assert keys(store) == [KEYS[1]]
    assert vpo("verify", store.folder.uri)[0] == 0


def test_what_else_lies_in_a_store_is_no_video(store: VideoStore, vpo: Any) -> None:
    """The jobs of an endpoint, the leases of renderers, and files of people."""
    at(store, KEYS[3]).unlink()
    foreign = {
        "jobs/video0123.json": b"{}",
        "jobs/open/video4567.json": b"{",
        "leases/00ff.json": b"",
        "notes.tmp": b"mine",
        "README.json": b"mine",
        "ab/notes.json": b"mine",
        f"ab/{KEYS[1]}.mp4": b"in a folder that is not its own",
        f"deep/{KEYS[0][:2]}/{KEYS[0]}.mp4": b"deeper",
        f"{KEYS[0][:2]}/{KEYS[0]}.txt": b"of another kind",
        f"jobs/video0123.json.{'0' * 32}.tmp": b"what an interrupted write left",
    }
    for name, data in foreign.items():
        store.folder.write(name, data)
        os.utime(Path(store.folder.path, name), (1, 1))
    for damaged in (b"", b"[" * 100_000, b"\xff"):
        store.folder.write(f"00/00{KEYS[0]}.json", damaged)
        assert [entry.key for entry in store.entries() if entry.key not in KEYS] == [f"00{KEYS[0]}"]
        assert vpo("verify", store.folder.uri)[0] == 1
    store.folder.delete(f"00/00{KEYS[0]}.json")
    status, out, _ = vpo("verify", store.folder.uri, "--delete")
    assert (status, out) == (0, "3 videos read, 0 damaged or incomplete, 0 deleted\n")
    assert vpo("prune", store.folder.uri, "--older-than", "0m", "--delete")[0] == 0
    *kept, left = foreign
    assert {name for name in foreign if store.folder.exists(name)} == set(kept)
    assert not store.folder.exists(left)


def test_verify_deletes_no_write_that_may_be_going_on(store: VideoStore, vpo: Any) -> None:
    at(store, KEYS[2], "json").unlink()
    assert vpo("verify", store.folder.uri, "--delete")[0] == 1
    assert keys(store) == KEYS[:3]


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ([], [3]),
        (["--older-than", "30d"], [0, 1, 3]),
        (["--older-than", "8w"], []),
        (["--older-than", "0m"], [0, 1, 2, 3]),
        (["--keep", "a"], [1, 3]),
        (["--keep", "a", "--keep", "b"], [3]),
        (["--keep", "a", "--older-than", "0m"], [1, 2, 3]),
    ],
)
def test_prune(store: VideoStore, vpo: Any, tmp_path: Path, options: list[str], goes: list[int]) -> None:
    for name, key in (("a", KEYS[0]), ("b", KEYS[1])):
        run_naming(tmp_path / name, key)
    options = [str(tmp_path / part) if part in "ab" else part for part in options]
    status, out, _ = vpo("prune", store.folder.uri, *options, "--json")
    assert status == 0
    assert [video["key"] for video in json.loads(out)["videos"]] == [KEYS[i] for i in goes]
    assert keys(store) == KEYS, "nothing goes without --delete"
    _, out, _ = vpo("prune", store.folder.uri, *options)
    assert ("Nothing was deleted" in out) == bool(goes)
    assert vpo("prune", store.folder.uri, *options, "--delete")[0] == 0
    assert keys(store) == [key for i, key in enumerate(KEYS) if i not in goes]


@pytest.mark.parametrize(
    "inner", ["rounds/2", "evaluation/videos-ab12", "evolution/scored", "refined/ab/evolution/scored"]
)
def test_videos_of_rounds_and_evaluations_are_kept_with_their_run(
    store: VideoStore, vpo: Any, tmp_path: Path, inner: str
) -> None:
    run_naming(tmp_path / "a", KEYS[0])
    run_naming(tmp_path / "a" / inner, KEYS[1])
    assert vpo("prune", store.folder.uri, "--keep", tmp_path / "a", "--delete")[0] == 0
    assert keys(store) == KEYS[:3]


def test_a_run_that_is_not_there_keeps_nothing_so_it_is_refused(
    store: VideoStore, vpo: Any, tmp_path: Path
) -> None:
    status, _, err = vpo("prune", store.folder.uri, "--keep", tmp_path / "typo", "--delete")
    assert status == 2
    assert "no run directory" in err
    assert keys(store) == KEYS


def test_the_store_of_a_recipe(vpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (Path(__file__).parents[2] / "jobs/recipes/tiny.yaml").read_text("utf-8")
    recipe.write_text(text.replace("out: runs/demo", f"out: {tmp_path}/run"), "utf-8")
    VideoStore(tmp_path / "run/videos").write(KEYS[0], b"1", {"prompt": "a cat", **SHAPE})
    status, out, _ = vpo("ls", recipe)
    assert status == 0
    assert out.startswith(KEYS[0])


def test_what_is_no_store_is_told(vpo: Any, tmp_path: Path) -> None:
    status, _, err = vpo("ls", tmp_path / "none")
    assert (status, "no such folder" in err) == (2, True)
    run_naming(tmp_path / "run")
    status, _, err = vpo("ls", tmp_path / "run")
    assert status == 2
    assert f"its own store is {tmp_path}/run/videos" in err


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1e9d"])
def test_an_age_that_is_none(store: VideoStore, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["videos", "prune", store.folder.uri, f"--older-than={text}"])
    assert caught.value.code == 2
    assert "is no age" in capsys.readouterr().err


def test_sizes_and_excerpts() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "5.0 TB",
    ]
    assert excerpt("a\tb\x00c", 10) == "a b c"
    assert excerpt("x" * 11, 10) == "x" * 9 + "…"
