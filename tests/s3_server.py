"""An S3-compatible server on loopback, which is the outside world of the tests of object stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from vpo_ray.files.folder import Folder

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def bucket(name: str) -> Iterator[str]:
    """Starts a server with an empty bucket, and sets credentials. Yields the options of its URIs."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    try:
        with pytest.MonkeyPatch.context() as environment:
            for variable, value in ENVIRONMENT.items():
                environment.setenv(variable, value)
            fs, _ = pafs.FileSystem.from_uri(f"s3://{name}?{options}&allow_bucket_creation=true")
            fs.create_dir(name)
            yield options
    finally:
        server.stop()


def upload(folder: Path, uri: str) -> str:
    """Copy a folder to a URI; returns the URI."""
    place = Folder(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place.write(str(path.relative_to(folder)), path.read_bytes())
    return uri
