"""Models at a URI: one whole, private copy a node, whatever is killed, damaged or changed."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import bucket

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.storage import cache_folder, model_cache
from vpo_ray.storage.cache_folder import VARIABLE
from vpo_ray.storage.model_cache import fetch, version

WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bucket("models") as options:
        yield options


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(model_cache, "_in_use", {})
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    """As if this process had ended: what it used, it uses no more."""
    for descriptor in model_cache._in_use.values():
        os.close(descriptor)
    model_cache._in_use.clear()


@pytest.fixture
def uri(server: str, tmp_path: Path) -> str:
    """A small model at a place of its own."""
    uri = f"s3://models/{tmp_path.name}/{tmp_path.parent.name}?{server}"
    place = Folder(uri)
    place.write("config.json", b'{"size": 1}')
    place.write("model.safetensors", WEIGHTS)
    place.write("vae/model.safetensors", WEIGHTS[::-1])
    return uri


def copies(cache: Path) -> list[str]:
    return sorted(path.stem for path in cache.glob("*.json"))


def elsewhere(uri: str, code: str) -> subprocess.Popen[str]:
    """Python with `uri` in another process of this node."""
    words = [sys.executable, "-c", f"from vpo_ray.storage.model_cache import *; uri = {uri!r}\n{code}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_no_uri_is_left_as_it_is(cache: Path, tmp_path: Path) -> None:
    assert fetch("org/model") == "org/model"
    assert fetch(str(tmp_path)) == str(tmp_path)
    assert fetch(tmp_path.as_uri()) == str(tmp_path)
    assert not cache.exists()


def test_a_uri_is_copied_whole_and_once(cache: Path, uri: str) -> None:
    path = Path(fetch(uri))
    assert path.parent == cache
    assert (path / "config.json").read_bytes() == b'{"size": 1}'
    assert (path / "vae/model.safetensors").read_bytes() == WEIGHTS[::-1]
    came = {file: file.stat().st_ino for file in path.rglob("*")}
    assert fetch(uri) == str(path)
    assert {file: file.stat().st_ino for file in path.rglob("*")} == came
    assert copies(cache) == [path.name]


def test_the_cache_is_the_users_alone(cache: Path, uri: str) -> None:
    before = os.umask(0)
    try:
        path = Path(fetch(uri))
    finally:
        os.umask(before)
    for folder in (cache, path, path / "vae"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_weights_are_left_out_where_they_are_not_read(cache: Path, uri: str) -> None:
    path = Path(fetch(uri, weights=False))
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["config.json"]
    assert fetch(uri) != str(path)
    assert fetch(uri, weights=False) == str(path)


def test_the_uri_may_be_one_files(cache: Path, uri: str) -> None:
    place, _, options = uri.partition("?")
    path = Path(fetch(f"{place}/vae/model.safetensors?{options}"))
    assert path.read_bytes() == WEIGHTS[::-1]
    assert path.name == "model.safetensors"


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], WEIGHTS[:-1] + b"x", b"", None])
def test_a_damaged_copy_is_never_used(cache: Path, uri: str, damage: bytes | None) -> None:
    file = Path(fetch(uri), "model.safetensors")
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    assert Path(fetch(uri), "model.safetensors").read_bytes() == WEIGHTS


def test_a_copy_that_was_only_touched_is_read_and_kept(cache: Path, uri: str) -> None:
    file = Path(fetch(uri), "model.safetensors")
    file.touch()
    before = file.stat().st_ino
    assert Path(fetch(uri), "model.safetensors").stat().st_ino == before


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b'{"files": 1}', b'{"files": {"config.json": 0}}'])
def test_a_copy_without_a_good_manifest_is_fetched_again(cache: Path, uri: str, manifest: bytes) -> None:
    path = Path(fetch(uri))
    (cache / f"{path.name}.json").write_bytes(manifest)
    (path / "model.safetensors").write_bytes(b"other")
    place, _, options = uri.partition("?")
    assert Path(fetch(f"{place}/vae?{options}"), "model.safetensors").exists(), "others are not its matter"
    assert Path(fetch(uri), "model.safetensors").read_bytes() == WEIGHTS


def test_a_model_that_changed_under_its_uri_is_fetched_anew(cache: Path, uri: str) -> None:
    first, name = Path(fetch(uri)), version(uri)
    # Same size, within the second that the store tells times in.
    Folder(uri).write("model.safetensors", WEIGHTS[::-1])
    assert version(uri) != name
    second = Path(fetch(uri))
    assert (second / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    # This process may still read the first; once nobody does, it goes.
    assert (first / "model.safetensors").read_bytes() == WEIGHTS
    forget()
    Folder(uri).delete("vae/model.safetensors")
    third = Path(fetch(uri))
    assert not (third / "vae").exists()
    assert copies(cache) == [third.name]


def test_a_model_that_changes_while_it_is_fetched_is_read_again(
    cache: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = model_cache._Copy._copy
    changes = [b'{"size": 2}', b'{"size": 3}']

    def changing(self: model_cache._Copy, file: model_cache._File) -> str:
        total = copy(self, file)
        if file.name == "config.json" and changes:
            Folder(uri).write("config.json", changes.pop())
        return total

    monkeypatch.setattr(model_cache._Copy, "_copy", changing)
    path = Path(fetch(uri))
    assert (path / "config.json").read_bytes() == b'{"size": 2}'
    assert copies(cache) == [path.name]


def test_processes_that_fetch_at_once_share_one_copy(cache: Path, uri: str) -> None:
    fetches = [elsewhere(uri, "print(fetch(uri))") for _ in range(3)]
    told = {process.communicate(timeout=60)[0].strip() for process in fetches}
    assert told == {fetch(uri)}
    assert copies(cache) == [Path(fetch(uri)).name]


def test_a_killed_download_is_not_used_and_cleared_away(cache: Path, uri: str) -> None:
    slow = """
import time
import vpo_ray.storage.model_cache as c
def copy(self, file):
    (self.part / "config.json").write_bytes(b"half")
    print("began", flush=True)
    time.sleep(60)
c._Copy._copy = copy
fetch(uri)
"""
    download = elsewhere(uri, slow)
    assert download.stdout is not None
    assert "began" in download.stdout.readline()
    # Another one waits for it, and when it is killed fetches by itself.
    waiting = elsewhere(uri, "print(fetch(uri))")
    time.sleep(0.3)
    assert waiting.poll() is None
    download.send_signal(signal.SIGKILL)
    download.wait(timeout=10)
    path = Path(waiting.communicate(timeout=60)[0].strip())
    assert (path / "config.json").read_bytes() == b'{"size": 1}'

    # A model that nobody asks for again leaves nothing either.
    download = elsewhere(uri.replace("?", "/vae?"), slow)
    assert download.stdout is not None
    assert "began" in download.stdout.readline()
    download.kill()
    download.wait(timeout=10)
    assert list(cache.glob("*.part"))
    fetch(uri)
    assert {file.name.partition(".")[0] for file in cache.iterdir()} == {path.name}


def test_copies_that_nobody_uses_go_and_those_in_use_stay(
    cache: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "KEPT", 1)
    user = elsewhere(uri, "import time; print(fetch(uri), flush=True); time.sleep(60)")
    assert user.stdout is not None
    used = Path(user.stdout.readline().strip())
    place, _, options = uri.partition("?")
    for number in range(3):
        Folder(f"{place}/{number}?{options}").write("config.json", str(number).encode())
        last = Path(fetch(f"{place}/{number}?{options}"))
        forget()
    assert used.name in copies(cache)
    assert last.name in copies(cache)
    assert len(copies(cache)) <= 3
    user.kill()
    user.communicate(timeout=10)
    for path in cache.glob("*.json"):
        os.utime(path, (0, 0))
    path = Path(fetch(f"{place}/0?{options}"))
    assert copies(cache) == [path.name]


def test_other_files_in_the_cache_are_let_be(cache: Path, uri: str) -> None:
    cache.mkdir(mode=0o700)
    (cache / "notes.txt").write_text("mine", "utf-8")
    (cache / "notes.json").write_text("{}", "utf-8")
    (cache / "models").mkdir()
    fetch(uri)
    assert {"notes.txt", "notes.json", "models"} <= {path.name for path in cache.iterdir()}


def test_room_is_made_or_a_full_disk_is_told(cache: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _, options = uri.partition("?")
    Folder(f"{place}/other?{options}").write("config.json", b"{}")
    fetch(f"{place}/other?{options}")
    forget()

    class Full:
        total, free = 10**12, 0

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    with pytest.raises(StorageError, match=VARIABLE) as caught:
        fetch(uri)
    assert copies(cache) == []
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC, "as stops.no_room looks for it: another node may have room"


def test_what_cannot_be_fetched_is_named(cache: Path, uri: str, server: str) -> None:
    with pytest.raises(StorageError, match=r"nothing.*holds no file"):
        fetch(f"s3://models/nothing?{server}")
    with pytest.raises(StorageError, match="nowhere"):
        fetch(f"s3://nowhere/x?{server}")
    with pytest.raises(StorageError, match=r"ftp://"):
        fetch("ftp://host/model")
    place, _, options = uri.partition("?")
    run = Folder(f"{place}/run?{options}")
    for name in ("recipe.yaml", "versions.json", "checkpoints/dpo/config.json"):
        run.write(name, b"{}")
    with pytest.raises(StorageError, match="is a run"):
        fetch(run.uri)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    Folder(uri).write("model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(StorageError, match="lacks model-00001-of-00002"):
        fetch(uri)
    assert copies(cache) == []


def test_a_name_that_leads_out_of_the_folder_is_refused(cache: Path) -> None:
    class Listing:
        type_name = "s3"

        def get_file_info(self, asked: object) -> object:
            import pyarrow.fs as pafs

            if isinstance(asked, str):
                return pafs.FileInfo(asked, pafs.FileType.Directory)
            return [pafs.FileInfo("b/m/../../evil", pafs.FileType.File, size=1)]

        def open_input_stream(self, path: str) -> object:
            import io

            stream = io.BytesIO(b"x")
            stream.metadata = dict  # type: ignore[attr-defined]
            return stream

    place = Folder("/b/m")
    place.fs, place.path = Listing(), "b/m"
    with pytest.raises(StorageError, match="elsewhere"):
        model_cache._source(place)


def test_the_cache_lies_in_the_users_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder.cache_folder() == tmp_path / "home/.cache/vpo_ray/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder.cache_folder() == tmp_path / "xdg/vpo_ray/models"
    assert stat.S_IMODE((tmp_path / "xdg/vpo_ray").stat().st_mode) == 0o700
    # A user without a home has a folder with the user's number, which is looked at too.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / f"vpo_ray-{os.geteuid()}"
    assert cache_folder.cache_folder() == mine / "models"
    (mine / "models").rmdir()
    mine.rmdir()
    (tmp_path / "theirs").mkdir()
    mine.symlink_to(tmp_path / "theirs")
    with pytest.raises(StorageError, match=f"link.*{VARIABLE}"):
        cache_folder.cache_folder()
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_cache_that_is_not_the_users_alone_is_refused(
    cache: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(StorageError, match="chmod 700"):
        fetch(uri)
    cache.chmod(0o755)
    fetch(uri)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    found = os.lstat(cache)

    def another(path: object) -> os.stat_result:
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:10]])

    monkeypatch.setattr("os.lstat", another)
    with pytest.raises(StorageError, match=f"belongs to user.*{VARIABLE}"):
        cache_folder.cache_folder()
