"""Model folders on disk and in object stores: fetch one, name what is in it, publish one whole.

A folder that training made carries `vpo.json`, written last: its presence says that the folder is
complete, its `job` says what made it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pyarrow.fs as pafs

from vpo_ray.folder import flush
from vpo_ray.records import Row, content_id
from vpo_ray.storage import Folder
from vpo_ray.train.examples import TrainError

MARKER = "vpo.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def marker(folder: str) -> Row | None:
    """What `vpo.json` of a trained model says, or None where there is no complete one."""
    place = Folder(folder)
    return place.read_json(MARKER) if place.exists(MARKER) else None


def refuse_adapter(model: str) -> None:
    """Raises TrainError for the folder of a LoRA adapter, which is no model by itself."""
    if "://" not in model and not os.path.isdir(model):
        return
    place = Folder(model)
    if place.exists("adapter_config.json") and not place.exists("config.json"):
        raise TrainError(
            f"{model} is a LoRA adapter, not a whole model: train it with lora.merge true to go on from it"
        )


def identity(model: str, revision: str | None) -> str:
    """Names a model without reading its weights: for a folder its config, the sizes of its files
    and what trained it; for a hub id that and its revision."""
    if "://" not in model and not os.path.isdir(model):
        return content_id("hub", model, revision)
    place = Folder(model)
    sizes = [(name, place.fs.get_file_info(f"{place.path}/{name}").size) for name in place.files()]
    config = place.read("config.json").decode() if place.exists("config.json") else ""
    return content_id("folder", sizes, config, marker(model))


def digest(folder: str) -> str:
    """SHA-256 of a local folder's weights, 16 hex digits."""
    total = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in WEIGHTS):
        with path.open("rb") as stream:
            total.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def fetch(model: str, weights: bool = True) -> str:
    """A model as transformers takes it: a URI is copied once to this machine's temporary folder,
    anything else is returned as it is. `weights=False` leaves the weights out."""
    if "://" not in model:
        return model
    place = Folder(model)
    local = Path(tempfile.gettempdir(), "vpo-models", content_id(identity(model, None), weights))
    if not local.is_dir():
        aside = local.with_name(f"{local.name}.{uuid.uuid4().hex}")
        for name in place.files():
            if weights or not name.endswith(WEIGHTS):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(f"{place.path}/{name}", str(aside / name), source_filesystem=place.fs)
        try:
            aside.rename(local)
        except OSError:  # another process was first; the copies are equal
            shutil.rmtree(aside)
    return str(local)


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
    # The checkpoints that it was made from are deleted next.
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
