"""Models of an object store on the node that needs them: each copied once a node, checked, and cleaned.

A recipe may name a model by URI, and a run on an object store has its checkpoints there; the engines
read folders. `fetch` brings a URI into the cache, a folder of this user alone (see `cache_folder`),
where all processes of a node share one copy. Of each copy there are:

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

# Of copies that no process uses, these many are kept, for so long, on so much of the disk.
KEPT, KEPT_S, KEPT_SHARE = 8, 7 * 24 * 3600, 0.25
# A store whose files change under a download is read again so many times.
TRIES = 3
_FILES_AT_ONCE = 8
_CHUNK = 8 * 2**20
_LOOK_EVERY_S = 0.1

# Held until this process ends: which copies it uses.
_in_use: dict[str, int] = {}


@dataclass(frozen=True)
class _File:
    """A file as the store lists it. `version` is the store's own name of its content."""

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
        """What decides whether it is still the same: where the store names a content, that same content
        uploaded again is no other."""
        return [[file.name, file.size, file.version or file.modified] for file in self.files]


def fetch(model: str, weights: bool = True) -> str:
    """The folder (or file) of a model on this node: a URI is copied unless it is here already, anything
    else is returned as it is. The copy stays as long as this process lives.

    Args:
        weights: False leaves the weights out, for what reads only configuration and tokenizer.

    Raises:
        StorageError: there is nothing at the URI, it cannot be read, files are missing or keep
            changing, the disk is full, or the cache is not this user's own.
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
    except OSError as error:  # a file system without locks, for one
        raise StorageError(f"cannot keep {model} in {root}: {error}; set {VARIABLE}") from error
    raise StorageError(f"{model}: its files change while they are fetched; try again when it is written")


def fetch_for_engine(model: str) -> str:
    """`fetch` on this node and on every other one of this actor's placement group: the workers of one
    engine may lie on several, and all look for the model in the same place.

    Raises:
        StorageError: as `fetch`, or a node has its cache elsewhere.
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
                f"{model} lies at {path} here and at {there} on another node of the same engine: set "
                f"{VARIABLE} to the same folder on every node"
            )
    return path


def version(model: str) -> str:
    """Names what the store has at a URI now, without reading it: another name when a file changes.

    Raises:
        StorageError: there is nothing, or it cannot be read.
    """
    source = _source(Folder(model))
    return content_id("model", source.uri, source.state)


def names(model: str) -> list[str]:
    """The files at a URI, by their names in its folder.

    Raises:
        StorageError: there is none, they cannot be listed, or weights that an index names are absent.
    """
    source = _source(Folder(model))
    _check(source)
    return [file.name for file in source.files]


def _source(place: Folder) -> _Source:
    """What the store has; a URI may also be that of one file.

    Raises:
        StorageError: nothing, a name that leads out of the folder, or a shard that an index names is absent.
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
        raise StorageError(f"{place.uri} holds no file")
    files = tuple(
        _File(info.path[len(folder) + 1 :], info.size or 0, info.mtime_ns or 0, found)
        for info, found in zip(infos, versions, strict=True)
    )
    for file in files:
        if {"", ".", ".."} & set(file.name.split("/")):
            raise StorageError(f"{place.uri} holds a file whose name leads elsewhere: {file.name!r}")
    return _Source(place.uri, place.fs, folder, files, lone)


def _version(fs: pafs.FileSystem, path: str) -> str:
    """What the store calls this content: times have whole seconds, within which a file may change."""
    with fs.open_input_stream(path) as stream:
        found = stream.metadata() or {}
    return next((value.decode() for name, value in found.items() if name.lower() == "etag"), "")


class _Place:
    """Where a copy is, whether there is one or not."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = root, key
        self.folder, self.part = root / key, root / f"{key}.part"
        self.aside = root / f"{key}.json.part"
        self.manifest, self.lock, self.use = (root / f"{key}.{end}" for end in ("json", "lock", "use"))

    def told(self) -> dict[str, Any]:
        """What the manifest says; empty without a good one."""
        try:
            found = json.loads(self.manifest.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the copy's lock, once whoever has it is done. The kernel takes it from a process that
        ends, however that ends."""
        told_at = time.monotonic() + 10
        while (descriptor := self._try_lock()) is None:
            if time.monotonic() > told_at:
                logger.info("waiting for another process of this node that fetches %s", self.folder)
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
            # One that was removed with its copy meanwhile locks nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(self.lock)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def hold(self) -> None:
        """Mark the copy as used by this process until it ends. With the lock held."""
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
            # Who wants to use it needs the lock first, and that is ours.
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
        # The manifest first: without it there is no copy, however much of it is left.
        for file in (self.manifest, self.aside):
            file.unlink(missing_ok=True)
        for folder in (self.folder, self.part):
            if folder.exists():
                shutil.rmtree(folder)


class _Copy(_Place):
    """The copy of what a store has now, with its weights or without."""

    def __init__(self, root: Path, source: _Source, weights: bool) -> None:
        self.source, self.weights = source, weights
        self.files = [file for file in source.files if weights or not file.is_weights]
        super().__init__(root, content_id("copy", source.uri, source.state, weights, digits=24))

    @property
    def path(self) -> str:
        return str(self.folder / self.files[0].name) if self.source.lone else str(self.folder)

    def take(self) -> bool:
        """Use the copy, fetched now where it is not here or is damaged; whether it was here."""
        with self.locked():
            here = self._is_whole()
            if not here:
                if self.manifest.exists():
                    logger.warning("%s is damaged, and is fetched again", self.folder)
                self.remove()
                self._download()
            self.hold()
            return here

    def _is_whole(self) -> bool:
        """Whether every file is as it came."""
        files = self.told().get("files")
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
        logger.info("fetching %s (%.2f GB) to %s", uri.partition("?")[0], size / 1e9, self.folder)
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
        """Copy one file to the unfinished folder; its SHA-256."""
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
            raise OSError(f"{file.name} came with {size} of its {file.size} bytes")
        return total.hexdigest()


def _check(source: _Source) -> None:
    """Raises StorageError for a whole run, and where an index names weights that are not there: an upload
    that was cut off."""
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
            raise StorageError(f"{source.uri} is not whole: it lacks {', '.join(absent[:3])} of {index}")


def _is_as_it_came(path: Path, was: dict[str, Any]) -> bool:
    """A file whose size or times are others than they were is read."""
    now = _times(path)
    if now == was["times"]:
        return True
    if now[0] != was["times"][0]:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == was["sha256"]


def _times(path: Path) -> list[int]:
    """Size, and the times of the last change of content and of anything."""
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
    """The copies that this process does not use, the latest used first: when, which, its manifest."""
    found = []
    for path in root.glob("*.json"):
        copy = _Place(root, path.stem)
        if _KEY.fullmatch(copy.key) and copy.key not in _in_use and copy.key != but:
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, copy, copy.told()))
    return sorted(found, key=lambda each: -each[0])


def _size(manifest: dict[str, Any]) -> int:
    """Bytes of a copy; 0 where its manifest is damaged."""
    try:
        return sum(int(each["times"][0]) for each in manifest["files"].values())
    except (AttributeError, LookupError, TypeError, ValueError):
        return 0


def _make_room(root: Path, size: int, uri: str) -> None:
    """Remove copies that no process uses, the longest unused first, until the disk takes `size` bytes.

    Raises:
        StorageError: it does not, with all of them gone.
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
    """Remove what killed downloads left, older states of the same model, and what was long not used."""
    mine = just.told()
    kept, kept_bytes, room = 0, 0, shutil.disk_usage(root).total * KEPT_SHARE
    for used, copy, told in _unused(root, just.key):
        same = (told.get("uri"), told.get("weights")) == (mine.get("uri"), mine.get("weights"))
        size = _size(told)
        old = time.time() - used > KEPT_S
        if same or old or kept >= KEPT or kept_bytes + size > room:
            copy.remove_if_unused()
        else:
            kept, kept_bytes = kept + 1, kept_bytes + size
    left = {path.name.partition(".")[0] for path in root.iterdir()} - {just.key} - set(_in_use)
    for key in left:
        if _KEY.fullmatch(key) and not (root / f"{key}.json").exists():
            _Place(root, key).remove_if_unused()
