"""What a reward's files are, by content: a part of its identity, whatever path leads to them."""

from __future__ import annotations

import re
from pathlib import Path

from vpo_ray.engines.video.weights import sampled
from vpo_ray.files.input_files import walk
from vpo_ray.records import content_id
from vpo_ray.storage import model_cache

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS = frozenset({".safetensors", ".json", ".txt", ".model"})


def weights_hash(name: str) -> str:
    """16 digits of a folder's or file's content (samples of a large file), of what a store says of a URI; a
    hub id as it is.

    Raises:
        StorageError: nothing is at the URI, or it cannot be read.
        FileNotFoundError: there is no such folder or file here.
    """
    if "://" in name:
        return model_cache.version(name)[:16]
    path = Path(name).expanduser()
    if path.is_dir():
        found = (file for file in walk(path, every_name=True) if file.suffix in _KINDS)
        files = sorted(file for file in found if not file.name.startswith("."))
        return content_id([[str(file.relative_to(path)), *sampled(file)] for file in files], digits=16)
    if path.is_file():
        return content_id(sampled(path), digits=16)
    if _HUB_ID.fullmatch(name):
        return name
    raise FileNotFoundError(f"no such file or folder here: {name}")
