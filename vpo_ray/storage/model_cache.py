"""Local copies of models in object stores: downloaded once per node, verified, and cleaned up.

A recipe may name a model by URI, and a run on an object store has its checkpoints there, but engines read
folders. `fetch` downloads a URI into the cache, a private folder of this user (see `cache_folder`), where all
processes of a node share one copy. A copy consists of:

    KEY/          the files; KEY is a function of the URI and of what the store has there now
    KEY.json      written last: sizes, SHA-256 and times of the files, and what the store had
    KEY.part/     a download that is not finished
    KEY.lock      held by the process that downloads, checks or removes the copy
    KEY.use       held (shared) by every process that uses it, until it ends
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder, StorageError, flush
from vpo_ray.records import content_id
from vpo_ray.storage.cache_folder import VARIABLE, cache_folder

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Beside these, what folders of models hold for other libraries.
_LARGE = (*WEIGHTS, ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")

_KEY = re.compile("[0-9a-f]{24}")

# Limits for unused copies: number, age, share of the disk.
KEPT, KEPT_S, KEPT_SHARE = 8, 7 * 24 * 3600, 0.25
# Tries to download files that change meanwhile.
TRIES = 3
_FILES_AT_ONCE = 8
_CHUNK = 8 * 2**20
_LOOK_EVERY_S = 0.1

# Locks of the copies that this process uses, held until it ends.
_in_use: dict[str, int] = {}


@dataclass(frozen=True)
class _File:
    """A file as the store lists it. `version` is the store's id of its content."""

    name: str
    size: int
    modified: int
    version: str

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(_LARGE)


@dataclass(frozen=True)
class _Source:
    """What a store has at a URI: the files in `folder` of it, or one `lone` file."""

    uri: str
    fs: pafs.FileSystem
    folder: str
    files: tuple[_File, ...]
    lone: bool

    @property
    def state(self) -> list[list[Any]]:
        """The identity of the content: by the store's version where it has one, so that the same content
        uploaded again is the same."""
        return [[file.name, file.size, file.version or file.modified] for file in self.files]


def fetch(model: str, weights: bool = True) -> str:
    """The local folder (or file) of a model. A URI is downloaded unless there is a copy already; anything
    else is returned unchanged. The copy stays as long as this process lives.

    Args:
        weights: False leaves out the weights, for callers that need only configuration and tokenizer.

    Raises:
        StorageError: there is nothing at the URI, it cannot be read, files are missing or keep
            changing, the disk is full, or the cache is not private to this user.
    """
    if "://" not in model:
        return model
    place = Folder(model)
    if place.is_local:
        return place.path
    root = cache_folder()
    try:
        for _ in range(TRIES):
            source = _source(place)
            copy = _Copy(root, source, weights)
            if copy.take() or _source(place).files == source.files:
                _tidy(root, copy)
                return copy.path
            copy.release()
            copy.remove_if_unused()
    except OSError as error:  # e.g. a filesystem without locks
        raise StorageError(f"cannot keep {model} in {root}: {error}; set {VARIABLE}") from error
    raise StorageError(f"{model}: its files change during the download; try again when it is complete")


def fetch_for_engine(model: str) -> str:
    """`fetch` on every node of this actor's placement group: the workers of an engine may be on several, and
    all read the model from the same path.

    Raises:
        StorageError: as `fetch`, or a node has its cache at another path.
    """
    path = fetch(model)
    if path == model:
        return path
    import ray
    from ray.util import get_current_placement_group, placement_group_table
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Without a cluster it would start one.
    group = get_current_placement_group() if ray.is_initialized() else None
    if group is None:
        return path
    here = ray.get_runtime_context().get_node_id()
    others = sorted(set(placement_group_table(group)["bundles_to_node_id"].values()) - {here})
    task = ray.remote(num_cpus=0)(fetch)
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in others]
    for there in ray.get([task.options(scheduling_strategy=each).remote(model) for each in on]):
        if there != path:
            raise StorageError(
                f"{model} is at {path} here and at {there} on another node of the same engine: set "
                f"{VARIABLE} to the same folder on every node"
            )
    return path


def version(model: str) -> str:
    """An id of the current files at a URI, without reading them; it changes when a file does.

    Raises:
        StorageError: there is nothing, or it cannot be listed.
    """
    source = _source(Folder(model))
    return content_id("model", source.uri, source.state)


def file_names(model: str) -> list[str]:
    """Names of the files at a URI.

    Raises:
        StorageError: there is none, they cannot be listed, or weights that an index names are absent.
    """
    source = _source(Folder(model))
    _check(source)
    return [file.name for file in source.files]


def _source(place: Folder) -> _Source:
    """The files at a URI, or the one file that it names.

    Raises:
        StorageError: nothing there, a name that leads out of the folder, or a missing shard of an index.
    """
    try:
        path = place.path.rstrip("/")
        own = place.fs.get_file_info(path)
        lone = own.type == pafs.FileType.File
        folder = os.path.dirname(path) if lone else path
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=True)
        infos = [own] if lone else [i for i in place.fs.get_file_info(selector) if i.is_file]
        infos.sort(key=lambda info: info.path)
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            versions = list(threads.map(lambda info: _version(place.fs, info.path), infos))
    except OSError as error:
        raise StorageError(f"cannot read {place.uri}: {error}") from error
    if not infos:
        raise StorageError(
            f"{place.uri} holds no file: is the path of the model right, and may it be listed?"
        )
    files = tuple(
        _File(info.path[len(folder) + 1 :], info.size or 0, info.mtime_ns or 0, found)
        for info, found in zip(infos, versions, strict=True)
    )
    for file in files:
        if {"", ".", ".."} & set(file.name.split("/")):
            raise StorageError(f"{place.uri} holds a file whose name leads elsewhere: {file.name!r}")
    return _Source(place.uri, place.fs, folder, files, lone)


def _version(fs: pafs.FileSystem, path: str) -> str:
    """The store's id of this content: times have whole seconds, within which a file may change."""
    with fs.open_input_stream(path) as stream:
        found = stream.metadata() or {}
    return next((value.decode() for name, value in found.items() if name.lower() == "etag"), "")


class _Place:
    """A copy, which may or may not exist yet."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = root, key
        self.folder, self.part = root / key, root / f"{key}.part"
        self.aside = root / f"{key}.json.part"
        self.manifest, self.lock, self.use = (root / f"{key}.{end}" for end in ("json", "lock", "use"))

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty if it is missing or damaged."""
        try:
            found = json.loads(self.manifest.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for the copy's lock and hold it. The kernel releases it when a process ends."""
        told_at = time.monotonic() + 10
        while (descriptor := self._try_lock()) is None:
            if time.monotonic() > told_at:
                logger.info("waiting for another process of this node that downloads %s", self.folder)
                told_at = float("inf")
            time.sleep(_LOOK_EVERY_S)
        try:
            yield
        finally:
            os.close(descriptor)

    def _try_lock(self) -> int | None:
        descriptor = _opened(self.lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock file that was removed with its copy locks nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(self.lock)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def hold(self) -> None:
        """Mark the copy as used by this process until it ends. Needs the lock."""
        os.utime(self.manifest)
        if self.key not in _in_use:
            descriptor = _opened(self.use)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _in_use[self.key] = descriptor

    def release(self) -> None:
        if (descriptor := _in_use.pop(self.key, None)) is not None:
            os.close(descriptor)

    def remove_if_unused(self) -> bool:
        """Remove the copy unless a process uses or fetches it."""
        locked = self._try_lock()
        if locked is None:
            return False
        used = _opened(self.use)
        try:
            # A new user would need the lock first, which we hold.
            fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.remove()
            self.use.unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning("%s is not used, but cannot be removed: %s", self.folder, error)
            return False
        finally:
            os.close(used)
            os.close(locked)
        return True

    def remove(self) -> None:
        # The manifest first: without it the rest does not count as a copy.
        for file in (self.manifest, self.aside):
            file.unlink(missing_ok=True)
        for folder in (self.folder, self.part):
            if folder.exists():
                shutil.rmtree(folder)


class _Copy(_Place):
    """The copy of a source, with or without weights."""

    def __init__(self, root: Path, source: _Source, weights: bool) -> None:
        self.source, self.weights = source, weights
        self.files = [file for file in source.files if weights or not file.is_weights]
        super().__init__(root, content_id("copy", source.uri, source.state, weights, digits=24))

    @property
    def path(self) -> str:
        return str(self.folder / self.files[0].name) if self.source.lone else str(self.folder)

    def take(self) -> bool:
        """Use the copy, downloading it if it is absent or damaged. Returns whether it was there."""
        with self.locked():
            here = self._is_whole()
            if not here:
                if self.manifest.exists():
                    logger.warning("%s is damaged and is downloaded again", self.folder)
                self.remove()
                self._download()
            self.hold()
            return here

    def _is_whole(self) -> bool:
        """Whether every file is as downloaded."""
        files = self.read_manifest().get("files")
        if not isinstance(files, dict) or set(files) != {file.name for file in self.files}:
            return False
        try:
            return all(_is_as_it_came(self.folder / name, was) for name, was in files.items())
        except (OSError, LookupError, TypeError):
            return False

    def _download(self) -> None:
        uri, size = self.source.uri, sum(file.size for file in self.files)
        _check(self.source)
        _make_room(self.root, size, uri)
        logger.info("downloading %s (%.2f GB) to %s", uri.partition("?")[0], size / 1e9, self.folder)
        try:
            self.part.mkdir(mode=0o700)
            with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
                sums = list(threads.map(self._copy, self.files))
            self.part.rename(self.folder)
            files = {
                file.name: {"sha256": total, "times": _times(self.folder / file.name)}
                for file, total in zip(self.files, sums, strict=True)
            }
            manifest = {"uri": uri, "weights": self.weights, "source": self.source.state, "files": files}
            _write_durably(self.manifest, self.aside, json.dumps(manifest, indent=1).encode())
        except OSError as error:
            with suppress(OSError):
                self.remove()
            raise StorageError(f"cannot fetch {uri} to {self.root}: {error}") from error

    def _copy(self, file: _File) -> str:
        """Download one file to the unfinished folder. Returns its SHA-256."""
        target = self.part / file.name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        total, size = hashlib.sha256(), 0
        path = f"{self.source.folder}/{file.name}"
        with self.source.fs.open_input_stream(path) as stream, open(target, "xb") as out:
            while chunk := stream.read(_CHUNK):
                out.write(chunk)
                total.update(chunk)
                size += len(chunk)
            out.flush()
            os.fsync(out.fileno())
        if size != file.size:
            raise OSError(f"{file.name} arrived with {size} of {file.size} bytes")
        return total.hexdigest()


def _check(source: _Source) -> None:
    """Raises StorageError for a run directory, and for weights of an index that are missing: an incomplete
    upload."""
    names = {file.name for file in source.files}
    if {"recipe.yaml", "versions.json"} <= names:
        raise StorageError(f"{source.uri} is a run, not a model: name one of its checkpoints/")
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        folder = os.path.dirname(index)
        try:
            with source.fs.open_input_stream(f"{source.folder}/{index}") as stream:
                shards = set(json.loads(stream.read())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(f"{source.uri}: cannot read {index}: {error}") from error
        if absent := sorted(shard for shard in shards if os.path.join(folder, shard) not in names):
            raise StorageError(f"{source.uri} is incomplete: it lacks {', '.join(absent[:3])} of {index}")


def _is_as_it_came(path: Path, was: dict[str, Any]) -> bool:
    """Whether a file is unchanged: by size and times, or else by its content."""
    now = _times(path)
    if now == was["times"]:
        return True
    if now[0] != was["times"][0]:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == was["sha256"]


def _times(path: Path) -> list[int]:
    """Size, and the times of the last change of content and of metadata."""
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _write_durably(path: Path, aside: Path, data: bytes) -> None:
    with open(aside, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    flush(path.parent)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _unused(root: Path, but: str = "") -> list[tuple[float, _Place, dict[str, Any]]]:
    """Copies that this process does not use, last used first: time of use, copy, manifest."""
    found = []
    for path in root.glob("*.json"):
        copy = _Place(root, path.stem)
        if _KEY.fullmatch(copy.key) and copy.key not in _in_use and copy.key != but:
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, copy, copy.read_manifest()))
    return sorted(found, key=lambda each: -each[0])


def _size(manifest: dict[str, Any]) -> int:
    """Bytes of a copy; 0 if its manifest is damaged."""
    try:
        return sum(int(each["times"][0]) for each in manifest["files"].values())
    except (AttributeError, LookupError, TypeError, ValueError):
        return 0


def _make_room(root: Path, size: int, uri: str) -> None:
    """Remove unused copies, the longest unused first, until `size` bytes fit on the disk.

    Raises:
        StorageError: they do not fit even without all of these copies.
    """
    unused = _unused(root)
    while shutil.disk_usage(root).free < size:
        if not unused:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))
            raise StorageError(
                f"{uri} takes {size / 1e9:.1f} GB, which {root} has no room for: set {VARIABLE} to a folder "
                "on a larger disk"
            ) from full
        unused.pop()[1].remove_if_unused()


def _tidy(root: Path, just: _Place) -> None:
    """Remove unfinished downloads, older states of the same model, and copies unused for long."""
    mine = just.read_manifest()
    kept, kept_bytes, room = 0, 0, shutil.disk_usage(root).total * KEPT_SHARE
    for used, copy, manifest in _unused(root, just.key):
        same = (manifest.get("uri"), manifest.get("weights")) == (mine.get("uri"), mine.get("weights"))
        size = _size(manifest)
        old = time.time() - used > KEPT_S
        if same or old or kept >= KEPT or kept_bytes + size > room:
            copy.remove_if_unused()
        else:
            kept, kept_bytes = kept + 1, kept_bytes + size
    left = {path.name.partition(".")[0] for path in root.iterdir()} - {just.key} - set(_in_use)
    for key in left:
        if _KEY.fullmatch(key) and not (root / f"{key}.json").exists():
            _Place(root, key).remove_if_unused()
