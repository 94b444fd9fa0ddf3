"""Fixtures that several test folders share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints `policy`, `judge`, `video` and `reward`; read only."""
    from vpo_ray.tiny import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder
