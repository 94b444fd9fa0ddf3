"""Model folders on disk and in object stores: identify what is in one, publish one atomically.

A folder made by training has a `vpo.json`, written last: its presence says that the folder is complete,
its `job` says what made it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder, flush, share
from vpo_ray.records import Row, content_id
from vpo_ray.storage.model_cache import WEIGHTS
from vpo_ray.storage.model_cache import fetch as fetch
from vpo_ray.train.examples import TrainError

MARKER = "vpo.json"
# Bytes read at each of so many places of a file of weights.
_SAMPLE, _SAMPLES = 64 * 1024, 16


def marker(folder: str) -> Row | None:
    """The content of a trained model's `vpo.json`, or None where there is no complete model."""
    place = Folder(folder)
    return place.read_json(MARKER) if place.exists(MARKER) else None


def refuse_adapter(model: str) -> None:
    """Raises TrainError for the folder of a LoRA adapter, which is not a model by itself."""
    if "://" not in model and not os.path.isdir(model):
        return
    place = Folder(model)
    if place.exists("adapter_config.json") and not place.exists("config.json"):
        raise TrainError(
            f"{model} is a LoRA adapter, not a whole model: train it with lora.merge true to continue from it"
        )


def identity(model: str, revision: str | None) -> str:
    """Identifies a model without reading its weights: a folder by its config, the sizes of its files and
    its `vpo.json`; a hub id by the id and the revision."""
    if "://" not in model and not os.path.isdir(model):
        return content_id("hub", model, revision)
    place = Folder(model)
    sizes = [(name, place.fs.get_file_info(f"{place.path}/{name}").size) for name in place.files()]
    config = place.read("config.json").decode() if place.exists("config.json") else ""
    return content_id("folder", sizes, config, marker(model))


def content_identity(model: str) -> str:
    """As `identity`, and a folder also by samples of its weights: the same wherever a copy of it lies, and
    another one where a training has written other weights into it."""
    if "://" not in model and not os.path.isdir(model):
        return identity(model, None)
    place = Folder(model)
    weights = sorted(name for name in place.files() if name.endswith(WEIGHTS))
    return content_id(identity(model, None), [_samples(place, name) for name in weights])


def _samples(place: Folder, name: str) -> str:
    """A hash of parts of a file. Raises OSError."""
    total = hashlib.sha256()
    with place.fs.open_input_file(f"{place.path}/{name}") as file:
        last = max(0, file.size() - _SAMPLE)
        for part in range(_SAMPLES):
            file.seek(last * part // (_SAMPLES - 1))
            total.update(file.read(_SAMPLE))
    return total.hexdigest()


def digest(folder: str) -> str:
    """SHA-256 of a local folder's weights, 16 hex digits."""
    total = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in WEIGHTS):
        with path.open("rb") as stream:
            total.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def publish(folder: Path, out: str) -> None:
    """Move a finished local folder to `out`, replacing an older one: a local folder by renaming, an
    object store by a copy that ends with the marker."""
    place = Folder(out)
    if not place.is_local:
        if place.exists(MARKER):
            place.fs.delete_file(f"{place.path}/{MARKER}")
        place.fs.delete_dir_contents(place.path, missing_dir_ok=True)
        for path in sorted(folder.iterdir(), key=lambda p: p.name == MARKER):
            pafs.copy_files(str(path), f"{place.path}/{path.name}", destination_filesystem=place.fs)
        return
    target = Path(place.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copytree(folder, aside)
    share(aside)
    # The checkpoints it was made from are deleted next.
    for path in (*aside.rglob("*"), aside):
        flush(path)
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        target.rename(old)
        aside.rename(target)
        flush(target.parent)
        shutil.rmtree(old)
    else:
        aside.rename(target)
        flush(target.parent)
