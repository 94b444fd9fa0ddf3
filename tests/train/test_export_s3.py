"""Exports are published on an object store (an S3 server on loopback) and on a disk that others read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import bucket

from vpo_ray.files.folder import Folder
from vpo_ray.storage.cache_folder import VARIABLE
from vpo_ray.train.model_files import MARKER, fetch, marker, publish


@pytest.fixture
def target() -> Iterator[str]:
    with bucket("models") as options:
        yield f"s3://models/run/checkpoints/dpo?{options}"


def test_an_export_is_published_with_its_marker_last_and_fetched_whole(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    local = tmp_path / "policy"
    local.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "one"), (MARKER, '{"job": "1"}')):
        (local / name).write_text(text, "utf-8")
    assert marker(target) is None
    publish(local, target)
    assert marker(target) == {"job": "1"}
    assert Folder(target).files() == ["config.json", "model.safetensors", MARKER]
    got = Path(fetch(target))
    assert sorted(path.name for path in got.iterdir()) == ["config.json", "model.safetensors", MARKER]
    assert not (Path(fetch(target, weights=False)) / "model.safetensors").exists()

    # Another export leaves nothing of the first.
    (local / "model.safetensors").rename(local / "model-00001-of-00002.safetensors")
    publish(local, target)
    assert Folder(target).files() == ["config.json", "model-00001-of-00002.safetensors", MARKER]

    # A copy that ends half-way leaves no marker: the folder is not taken for a finished one.
    (local / MARKER).write_text('{"job": "2"}', "utf-8")
    (local / "model-00001-of-00002.safetensors").unlink()
    (local / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "lost")
    with pytest.raises(OSError, match=r"lost|No such file"):
        publish(local, target)
    assert marker(target) is None


def test_the_weights_that_a_killed_export_left_are_deleted(tmp_path: Path) -> None:
    local = tmp_path / "policy"
    local.mkdir()
    (local / MARKER).write_text("{}", "utf-8")
    run = tmp_path / "run [1]"
    left = [run / f".dpo.{'a' * 32}", run / f".dpo.{'b' * 32}.old"]
    others = [run / f".sft.{'a' * 32}", run / ".dpo.notes", run / f".dpo.{'c' * 32}.txt"]
    for folder in (*left, *others):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    publish(local, str(run / "dpo"))
    assert sorted(run.iterdir()) == sorted([run / "dpo", *others])


def test_whoever_may_read_new_files_may_read_an_exports_weights(tmp_path: Path) -> None:
    local, usual = tmp_path / "policy", tmp_path / "usual"
    for folder in (local, usual):
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "model.safetensors").touch()
    # As safetensors and temporary folders are written.
    (local / "part" / "model.safetensors").chmod(0o600)
    (local / "part").chmod(0o700)
    local.chmod(0o700)
    publish(local, str(tmp_path / "dpo"))
    for name in ("", "part", "part/model.safetensors"):
        assert (tmp_path / "dpo" / name).stat().st_mode == (usual / name).stat().st_mode, name
