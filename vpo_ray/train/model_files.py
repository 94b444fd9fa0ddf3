"""Model folders on disk and in object stores: identify what is in one, publish one atomically.

A folder made by training has a `vpo.json`, written last: its presence says that the folder is complete,
its `job` says what made it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Sequence
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
# Beside weights, what loaders of a model and of its tokenizer read.
_READ = (".json", ".jinja", ".py", ".model", ".tiktoken")
_VOCABULARIES = ("merges.txt", "vocab.txt")


def marker(folder: str) -> Row | None:
    """The content of a trained model's `vpo.json`, or None where there is no complete model."""
    place = Folder(folder)
    return place.read_json(MARKER) if place.exists(MARKER) else None


def refuse_adapter(model: str) -> None:
    """Raises TrainError for the folder of a LoRA adapter, which is no model by itself: whatever lies beside
    its settings, transformers loads the base model that they name."""
    if not _is_folder(model):
        return
    place = Folder(model)
    if place.exists("adapter_config.json"):
        raise TrainError(
            f"{model} is a LoRA adapter, not a whole model: train it with lora.merge true to continue from it"
        )


def former_identity(model: str, revision: str | None) -> str:
    """What `identity` was in earlier versions, a folder by the sizes of all that is in it: phases that they
    trained are known by it."""
    if not _is_folder(model):
        return content_id("hub", model, revision)
    place = Folder(model)
    sizes = [(name, place.fs.get_file_info(f"{place.path}/{name}").size) for name in place.files()]
    config = place.read("config.json").decode() if place.exists("config.json") else ""
    return content_id("folder", sizes, config, marker(model))


def identity(model: str, revision: str | None) -> str:
    """Identifies a model: a hub id by the id and the revision; a folder by what a loader reads of it, its
    weights by samples (a training moves every weight). It is the same wherever a copy of the folder lies, and
    whatever else is put into it, and another one where a training has written other weights."""
    if not _is_folder(model):
        return content_id("hub", model, revision)
    place = Folder(model)
    return content_id("model", [(name, *_sampled(place, name)) for name in _loaded(place.files())])


def _is_folder(model: str) -> bool:
    return "://" in model or os.path.isdir(model)


def _loaded(names: Sequence[str]) -> list[str]:
    """Of the files of a folder, those that make the model and its tokenizer what they are."""
    own = [name for name in names if "/" not in name and not name.startswith(".")]
    weights = [name for name in own if name.endswith(WEIGHTS)]
    # Where there are both, the others are not loaded.
    safe = [name for name in weights if name.endswith(".safetensors")]
    read = [name for name in own if name.endswith(_READ) or name in _VOCABULARIES]
    return [*read, *(safe or weights)]


def _sampled(place: Folder, name: str) -> tuple[int, str]:
    """The size of a file, and a hash of it, or of parts where it is large. Raises OSError."""
    total = hashlib.sha256()
    with place.fs.open_input_file(f"{place.path}/{name}") as file:
        size = file.size()
        if size <= _SAMPLE * _SAMPLES or not name.endswith(WEIGHTS):
            total.update(file.read())
        else:
            for part in range(_SAMPLES):
                file.seek((size - _SAMPLE) * part // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE))
    return size, total.hexdigest()


def digest(folder: str) -> str:
    """SHA-256 of a local folder's weights, 16 hex digits."""
    total = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in WEIGHTS):
        with path.open("rb") as stream:
            total.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def discard_leftovers(out: str) -> None:
    """Delete the copies of weights that killed publishers left beside a local `out`. Nobody else publishes to
    it meanwhile: a run has one driver."""
    place = Folder(out)
    if not place.is_local:
        return
    target = Path(place.path)
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if re.fullmatch(r"[0-9a-f]{32}(\.old)?", path.name.removeprefix(f".{target.name}.")):
            shutil.rmtree(path, ignore_errors=True)


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
    discard_leftovers(out)
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
