"""Exports on an object store: an S3 server on loopback, which is the outside world here."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from vpo_ray.storage import Folder
from vpo_ray.train.model_files import MARKER, fetch, marker, publish


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http"
    pafs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    ).create_dir("models")
    yield f"s3://models/run/checkpoints/dpo?{options}"
    server.stop()


def test_an_export_is_published_with_its_marker_last_and_fetched_whole(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    local = tmp_path / "policy"
    local.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "one"), (MARKER, '{"job": "1"}')):
        (local / name).write_text(text)
    assert marker(bucket) is None
    publish(local, bucket)
    assert marker(bucket) == {"job": "1"}
    assert Folder(bucket).files() == ["config.json", "model.safetensors", MARKER]
    got = Path(fetch(bucket))
    assert sorted(path.name for path in got.iterdir()) == ["config.json", "model.safetensors", MARKER]
    assert not (Path(fetch(bucket, weights=False)) / "model.safetensors").exists()

    # Another export leaves nothing of the first.
    (local / "model.safetensors").rename(local / "model-00001-of-00002.safetensors")
    publish(local, bucket)
    assert Folder(bucket).files() == ["config.json", "model-00001-of-00002.safetensors", MARKER]

    # A copy that ends half-way leaves no marker: the folder is not taken for a finished one.
    (local / MARKER).write_text('{"job": "2"}')
    (local / "model-00001-of-00002.safetensors").unlink()
    (local / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "lost")
    with pytest.raises(OSError, match=r"lost|No such file"):
        publish(local, bucket)
    assert marker(bucket) is None
