"""The content-addressed video store, and what decides a video's key."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.recipe import Render
from vpo_ray.storage import videos
from vpo_ray.storage.videos import OPERATIONAL, VideoDamaged, VideoMissing, VideoStore, video_key

BASE: dict[str, Any] = {"model": "m"}
KEY = "ab" + "0" * 30
DATA = bytes(range(256)) * 8
# Another value for every key of the render section: a new key has to be added here, and with it
# the decision whether it changes pixels.
OTHER: dict[str, Any] = {
    "model": "n",
    "revision": "main",
    "lora": {"path": "style.safetensors"},
    "dtype": "float16",
    "vae_dtype": "float32",
    "scheduler": "CogVideoXDPMScheduler",
    "scheduler_options": {"timestep_spacing": "trailing"},
    "steps": 49,
    "guidance": 5.5,
    "negative_prompt": "blurred",
    "frames": 17,
    "fps": 16,
    "height": 256,
    "width": 256,
    "call_options": {"use_dynamic_cfg": True},
    "max_text_tokens": 100,
    "long_prompts": "error",
    "crf": 0,
    "vae_tiling": True,
    "vae_slicing": True,
    "compile": True,
    "quantize": "int8_weight_only",
    "attention": "native",
    "cache": "faster",
    "cache_options": {"threshold": 0.1},
    "offload": "model",
    "strategy": "adaptive",
    "preview": {"steps": 4},
    "batch_size": 4,
    "time_limit_s": 5,
    "store": "s3://videos",
    "device": "cpu",
    "trust_remote_code": True,
    "pool": {"size": 8},
}


def key(settings: dict[str, Any], prompt: str = "a cat", seed: int = 1, model: str = "folder:1") -> str:
    return video_key(Render(**settings), prompt, seed, model)


# Of those that are tried one by one; context_parallel asks for GPUs in the pool as well, and others are of
# another kind, whose keys tests/engines/video/test_openai_video.py looks at.
@pytest.mark.parametrize(
    "name",
    sorted(
        Render.model_fields.keys() - {"preset", "context_parallel", "kind", "version", "endpoint", "options"}
    ),
)
def test_the_key_changes_with_every_setting_that_changes_pixels(name: str) -> None:
    changed = key(BASE | {name: OTHER[name]})
    assert (changed == key(BASE)) == (name in OPERATIONAL)


def test_the_key_does_not_change_with_the_gpus_of_a_replica() -> None:
    assert key(BASE | {"context_parallel": 2, "pool": {"num_gpus": 2}}) == key(BASE)


def test_a_preset_is_the_settings_in_it() -> None:
    written_out = Render(preset="cogvideox-5b").model_dump(exclude={"preset"})
    assert key({"preset": "cogvideox-5b"}) == key(written_out)


def test_operational_settings_exist() -> None:
    assert set(Render.model_fields) >= OPERATIONAL


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_keys_are_equal_where_prompt_and_seed_are(one: str, other: str, seed: int, next_seed: int) -> None:
    same = (one, seed) == (other, next_seed)
    assert (key(BASE, one, seed) == key(BASE, other, next_seed)) == same


def test_the_key_names_the_model_and_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key(BASE) != key(BASE, model="folder:2")
    before = key(BASE)
    monkeypatch.setattr(videos, "library_versions", lambda: {"diffusers": "9.9"})
    assert key(BASE) != before


def test_keys_are_stable_over_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    # A store outlives a version of this package: this value may only change with a reason.
    monkeypatch.setattr(videos, "library_versions", lambda: {"torch": "2.13"})
    assert key(BASE) == "7dec4121b8121af34c1196af905e8c55"


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore(tmp_path / "store")


def at(store: VideoStore, kind: str) -> Path:
    return Path(store.uri(KEY)).with_suffix(f".{kind}")


def test_round_trip(store: VideoStore) -> None:
    assert not store.has(KEY)
    info = store.write(KEY, DATA, {"prompt": "a cat", "frames": 9})
    assert store.has(KEY)
    assert store.read(KEY) == DATA
    assert store.info(KEY) == info
    assert (info["length"], info["frames"], info["prompt"]) == (len(DATA), 9, "a cat")
    assert at(store, "mp4").read_bytes() == DATA
    assert [(entry.key, entry.complete) for entry in store.entries()] == [(KEY, True)]
    store.delete(KEY)
    store.delete(KEY)
    assert list(store.entries()) == []
    with pytest.raises(VideoMissing, match=KEY):
        store.read(KEY)


def _cut(store: VideoStore) -> None:
    at(store, "mp4").write_bytes(DATA[:-1])


def _flip(store: VideoStore) -> None:
    at(store, "mp4").write_bytes(DATA[:-1] + b"x")


def _lose_video(store: VideoStore) -> None:
    at(store, "mp4").unlink()


def _lose_sidecar(store: VideoStore) -> None:
    at(store, "json").unlink()


def _cut_sidecar(store: VideoStore) -> None:
    at(store, "json").write_bytes(at(store, "json").read_bytes()[:20])


def _other_sidecar(store: VideoStore) -> None:
    at(store, "json").write_text(json.dumps({"key": KEY}), "utf-8")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_cut, VideoDamaged),
        (_flip, VideoDamaged),
        (_lose_video, VideoMissing),
        (_lose_sidecar, VideoMissing),
        (_cut_sidecar, VideoMissing),
        (_other_sidecar, VideoMissing),
    ],
)
def test_damage_is_seen_and_repaired_by_writing_again(
    store: VideoStore, damage: Callable[[VideoStore], None], error: type[Exception]
) -> None:
    store.write(KEY, DATA, {})
    damage(store)
    with pytest.raises(error):
        store.read(KEY)
    assert not store.has(KEY)
    assert [found for found, _ in store.verify()] == [KEY]
    store.write(KEY, DATA, {})
    assert store.read(KEY) == DATA
    assert list(store.verify()) == []


def steps(store: VideoStore, monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Calls `look` before and after every change that is made to a file of the store."""
    for name in ("write", "delete"):
        change = getattr(Folder, name)

        def changed(folder: Folder, *arguments: Any, change: Any = change) -> Any:
            look()
            result = change(folder, *arguments)
            look()
            return result

        monkeypatch.setattr(Folder, name, changed)


@pytest.mark.parametrize("length", [len(DATA), len(DATA) + 1])
def test_a_reader_meets_the_old_video_or_the_new_one(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    new = b"n" * length
    store.write(KEY, DATA, {"take": 1})
    seen = []

    def look() -> None:
        other = VideoStore(store.folder.uri)
        monkeypatch.undo()  # a look changes nothing, or it is told below
        info = other.hit(KEY)
        assert info is not None
        data = other.read(KEY)
        seen.append((info["take"], data))
        assert list(other.verify()) == []
        assert [entry.key for entry in other.entries()] == [KEY]
        steps(store, monkeypatch, look)

    steps(store, monkeypatch, look)
    store.write(KEY, new, {"take": 2})
    monkeypatch.undo()
    assert set(seen) == {(1, DATA), (2, new)}
    assert store.folder.files() == [f"ab/{KEY}.json", f"ab/{KEY}.mp4"]


def test_a_replacement_that_is_interrupted_leaves_a_whole_video(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at_step in range(8):
        store.write(KEY, DATA, {"take": 1})
        left = at_step

        def look() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            steps(store, patch, look)
            with pytest.raises(KeyboardInterrupt):
                store.write(KEY, b"new", {"take": 2})
        info = store.hit(KEY)
        assert info is not None
        assert (info["take"], store.read(KEY)) in {(1, DATA), (2, b"new")}
        store.prune(datetime.now(UTC) + timedelta(minutes=1))
        if at_step < 2:
            assert store.folder.files() == [f"ab/{KEY}.json", f"ab/{KEY}.mp4"]


def rot(path: Path, data: bytes) -> None:
    """Other bytes in the file, as a bad disk leaves them: nobody wrote, so the time is as it was."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_byte_that_rots_is_seen_by_the_read_and_rendered_again(store: VideoStore) -> None:
    store.write(KEY, DATA, {"prompt": "a cat"})
    rot(at(store, "mp4"), DATA[:-1] + b"x")
    assert [key for key, _ in store.verify()] == [KEY]
    assert store.has(KEY), "a hit reads no video"
    with pytest.raises(VideoDamaged, match="other bytes"):
        store.read(KEY)
    assert not store.has(KEY), "from then on it counts as absent"
    with pytest.raises(VideoMissing):
        store.read(KEY)
    store.write(KEY, DATA, {"prompt": "a cat"})
    assert store.has(KEY)


def test_a_hit_reads_no_video_and_a_copied_store_is_hashed_once(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(KEY, DATA, {"prompt": "a cat"})
    read: list[str] = []
    checked = VideoStore._checked
    monkeypatch.setattr(VideoStore, "_checked", lambda *a: read.append(a[1]) or checked(*a))
    assert store.hit(KEY) == store.info(KEY)
    assert read == []
    os.utime(at(store, "mp4"))
    info = store.hit(KEY)
    assert info is not None
    assert store.has(KEY)
    assert read == [KEY]
    assert store.info(KEY)["prompt"] == "a cat"


def test_a_video_of_a_store_without_times_is_hashed(store: VideoStore) -> None:
    info = store.write(KEY, DATA, {})
    del info["mtime_ns"]
    at(store, "json").write_text(json.dumps(info), "utf-8")
    assert store.has(KEY)
    rot(at(store, "mp4"), DATA[:-1] + b"x")
    assert store.has(KEY), "noted by the first look-up"


@pytest.mark.parametrize("bad", ["../../etc/passwd", "a/b", "", "a.b"])
def test_a_key_is_never_a_path(store: VideoStore, bad: str) -> None:
    with pytest.raises(ValueError, match="not a video key"):
        store.read(bad)


@pytest.mark.parametrize("key", [KEY, "a", "video1", "A1b2"])
def test_a_video_is_listed_under_any_key_that_it_can_be_written_under(store: VideoStore, key: str) -> None:
    store.write(key, DATA, {})
    at = Path(store.uri(key))
    at.with_name(f"{key}.txt").write_text("about it", "utf-8")
    store.folder.write(f"elsewhere/{at.name}", DATA)
    assert [entry.key for entry in store.entries()] == [key]


def test_a_store_that_cannot_be_used_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    store = VideoStore(tmp_path / "file" / "store")
    with pytest.raises(StorageError, match="file/store"):
        store.write(KEY, DATA, {})


@pytest.mark.usefixtures("as_a_user")
def test_a_read_only_store_can_be_read(store: VideoStore) -> None:
    store.write(KEY, DATA, {})
    folder = Path(store.folder.uri)
    folder.chmod(0o500)
    try:
        assert store.read(KEY) == DATA
        with pytest.raises(StorageError, match="cannot write"):
            store.write("cd" + "0" * 30, DATA, {})
    finally:
        folder.chmod(0o700)


def test_prune_takes_leftovers_and_only_on_demand_whole_videos(store: VideoStore) -> None:
    other = "cd" + "0" * 30
    store.write(KEY, DATA, {})
    store.write(other, DATA, {})
    half = "ef" + "0" * 30
    store.write(half, DATA, {})
    Path(store.uri(half)).with_suffix(".json").unlink()
    Path(store.uri(KEY) + ".1234.tmp").write_bytes(b"half")
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert store.prune(later - timedelta(days=1)) == []
    assert len(store.prune(later, complete=True, dry_run=True)) == 4
    assert {entry.key for entry in store.entries()} == {KEY, other, half}
    assert {entry.key for entry in store.prune(later)} == {half, f"{KEY}.mp4.1234.tmp"}
    assert {entry.key for entry in store.entries()} == {KEY, other}
    assert [entry.key for entry in store.prune(later, keep={KEY}, complete=True)] == [other]
    assert store.read(KEY) == DATA
    assert store.folder.files(".tmp") == []
