"""The store of rendered videos, addressed by content, so that nothing is rendered twice.

A video's key is a hash of all that determines its pixels: prompt, seed, model, settings and library versions.
`ab/<key>.mp4` has the bytes that the reward reads, and its sidecar `ab/<key>.json` describes them. The
sidecar is written last: an mp4 without one is an interrupted write and counts as absent. When a video is
replaced, the new sidecar is first written as `ab/<key>.<sha256>.json`, so that a reader finds a matching
sidecar for either bytes. A store is a folder on any filesystem of `pyarrow.fs`, shared by runs and recipes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder, StorageError, chunks
from vpo_ray.files.image_files import image_hash
from vpo_ray.recipe import Render
from vpo_ray.records import content_id

# Keys of the render section that change how a video is made but not its pixels. `kind`, `model`, `version`,
# `revision` and `lora` are in the key as the model's identity. Every other key of the section, also a new
# one, changes pixels.
OPERATIONAL = frozenset(
    {
        "kind",
        "preset",
        "model",
        "revision",
        "lora",
        "strategy",
        "preview",
        "batch_size",
        "context_parallel",
        "long_prompts",
        "vae_slicing",
        "offload",
        "time_limit_s",
        "store",
        "device",
        "trust_remote_code",
        "pool",
        "version",
        "endpoint",
    }
)
READERS = 8  # files read at once; an object store takes tens of ms for each
# The files of a video, and leftovers of an interrupted write.
_FILE = re.compile(r"[^/]+/(?P<key>[0-9A-Za-z]+)\.(?P<kind>mp4|json)")
_LEFT = re.compile(r"\.[0-9a-f]+\.tmp$|^[0-9a-f]+\.[0-9a-f]{64}\.json$|^[0-9a-f]+-[0-9a-f]{32}\.json$")
_LIBRARIES = ("diffusers", "torch", "transformers")


class VideoMissing(LookupError):
    """The store has no complete video under this key."""


class VideoDamaged(ValueError):
    """The bytes under this key are not those that were written; the next render replaces them.

    Args:
        sha256: of the bytes found.
    """

    def __init__(self, message: str, sha256: str = "") -> None:
        super().__init__(message)
        self.sha256 = sha256


class Entry(NamedTuple):
    """A key in the store: bytes on disk, time of the last write, and whether it is complete."""

    key: str
    size: int
    written: datetime
    complete: bool


def key_parts(
    settings: Render, prompt: str, seed: int, model: str, image: str | None = None
) -> dict[str, Any]:
    """All that determines the pixels of a video, as JSON-able parts.

    Args:
        model: the video model's identity, see `engines.video.Prepared`.
        image: the name of the query's image, if it has one; its hash is a part.

    Settings that are off (null, false, empty) are left out, so that an option added by a later version does
    not change the keys of existing videos.
    """
    chosen = settings.model_dump(mode="json", exclude=set(OPERATIONAL))
    on = {name: value for name, value in chosen.items() if value not in (None, False, [], {})}
    versions: dict[str, str] = {}
    if settings.kind == "openai":
        on = {"request": settings.endpoint.request}
    elif settings.kind == "diffusers":
        versions = library_versions() | (_versions("torchao") if settings.quantize else {})
    parts = {"prompt": prompt, "seed": seed, "model": model, "settings": on, "versions": versions}
    return parts if image is None else {**parts, "image": image_hash(image)}


def video_key(settings: Render, prompt: str, seed: int, model: str, image: str | None = None) -> str:
    return content_id("video", key_parts(settings, prompt, seed, model, image))


def library_versions() -> dict[str, str]:
    """Major and minor versions of the libraries that compute pixels: patch releases keep them."""
    return _versions(*_LIBRARIES)


@cache
def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = ".".join(version(name).split(".")[:2])
        except PackageNotFoundError:
            found[name] = "absent"
    return found


class VideoStore:
    """Videos by key. Picklable; cheap to make; any number of processes may use one at once.

    Args:
        uri: a local folder or a URI that `pyarrow.fs` opens. It is made by the first write.
    """

    def __init__(self, uri: str | Path) -> None:
        self.folder = Folder(uri)

    def uri(self, key: str) -> str:
        return self.folder.at(_name(key, "mp4"))

    def info(self, key: str) -> dict[str, Any]:
        """The sidecar. Raises VideoMissing if there is none, or it is unreadable."""
        return self._sidecar(key, _name(key, "json"))

    def _sidecar(self, key: str, name: str) -> dict[str, Any]:
        sidecar = self._read(name)
        try:
            found = json.loads(sidecar)
        except (ValueError, RecursionError) as error:
            raise VideoMissing(f"the sidecar of video {key} in {self.folder.uri} is damaged") from error
        if not isinstance(found, dict) or not {"length", "sha256"} <= found.keys():
            raise VideoMissing(f"the sidecar of video {key} in {self.folder.uri} is of another format")
        return found

    def read(self, key: str) -> bytes:
        """The mp4, checked against length and hash in its sidecar.

        The sidecar of a damaged video is removed: it then counts as absent and is rendered again.

        Raises:
            VideoMissing: there is no complete video under this key.
            VideoDamaged: its bytes are not those that were written.
        """
        try:
            return self._together(key)[1]
        except VideoDamaged:
            with suppress(StorageError):  # the fault is reported for a read-only store too
                self.folder.delete(_name(key, "json"))
            raise

    def has(self, key: str) -> bool:
        return self.hit(key) is not None

    def hit(self, key: str) -> dict[str, Any] | None:
        """The sidecar if the video can be used as it is, None if it has to be rendered.

        Length and modification time are compared with the sidecar's, without reading the file: this detects
        one that was truncated, overwritten or edited. If the times differ (also in a copied store), the bytes
        are hashed once and the sidecar records the new time. Corruption by a disk is detected by `read`,
        which always hashes; `verify` reads the whole store.
        """
        try:
            info, file = self.info(key), self._stat(key)
            if (file.size, file.mtime_ns) == (info["length"], info.get("mtime_ns")):
                return info
            found, _ = self._together(key)
            if file.size == found["length"]:
                with suppress(StorageError):
                    self.folder.write_json(_name(key, "json"), {**found, "mtime_ns": file.mtime_ns})
            return found
        except (VideoMissing, VideoDamaged):
            return None

    def write(self, key: str, data: bytes, sidecar: dict[str, Any]) -> dict[str, Any]:
        """Store a video and then its sidecar; a reader finds the old ones or the new ones.

        Returns:
            The sidecar, with `key`, `length` and `sha256` of the bytes and the file's `mtime_ns`.

        Raises:
            StorageError: read-only, full, no access.
        """
        digest = hashlib.sha256(data).hexdigest()
        sidecar = {**sidecar, "key": key, "length": len(data), "sha256": digest}
        coming = _name(key, f"{digest}.json")
        replaces = self.folder.exists(_name(key, "json"))
        if replaces:
            self.folder.write_json(coming, sidecar)
        modified = self.folder.write(_name(key, "mp4"), data) or self._stat(key).mtime_ns
        sidecar["mtime_ns"] = modified
        self.folder.write_json(_name(key, "json"), sidecar)
        if replaces:
            self.folder.delete(coming)
        return sidecar

    def delete(self, key: str) -> None:
        """Remove a video, sidecar first, so that no reader takes half an entry for a complete one."""
        for kind in ("json", "mp4"):
            self.folder.delete(_name(key, kind))

    def entries(self) -> Iterator[Entry]:
        """Every key with a file in the store, complete or not, sorted. Other files, such as jobs of an
        endpoint, are skipped."""
        found: dict[str, dict[str, pafs.FileInfo]] = {}
        for file in self._listing():
            name = file.path[len(self.folder.path) + 1 :]
            if (match := _FILE.fullmatch(name)) and name == _name(*match.groups()):
                found.setdefault(match["key"], {})[match["kind"]] = file
        for key, files in sorted(found.items()):
            size = sum(file.size or 0 for file in files.values())
            yield Entry(key, size, max(file.mtime for file in files.values()), len(files) == 2)

    def verify(self) -> Iterator[tuple[str, str]]:
        """Read every video; yields key and problem of each incomplete or damaged one."""
        yield from ((entry.key, problem) for entry, problem in self.inspect() if problem is not None)

    def inspect(self) -> Iterator[tuple[Entry, str | None]]:
        """Read every video; yields each entry with its problem, or None."""
        with ThreadPoolExecutor(READERS) as readers:
            for some in chunks(self.entries(), 16 * READERS):
                yield from zip(some, readers.map(self._problem, some), strict=True)

    def infos(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, dict[str, Any] | None]]:
        """The sidecars of entries; None for a missing or unreadable one."""
        with ThreadPoolExecutor(READERS) as readers:
            for some in chunks(entries, 16 * READERS):
                yield from zip(some, readers.map(self._info, some), strict=True)

    def prune(
        self, before: datetime, keep: Container[str] = (), *, complete: bool = False, dry_run: bool = False
    ) -> list[Entry]:
        """Delete leftovers of interrupted writes, and with `complete` complete videos too.

        Args:
            before: only files written before this time (with a time zone), so that writes in progress are
                not touched.
            keep: keys that stay, such as those in a run's table.
            dry_run: delete nothing.

        Returns:
            What was (or would be) deleted, leftovers of interrupted writes and renders included under
            their names.
        """
        old = [entry for entry in self.entries() if entry.written < before and entry.key not in keep]
        gone = [entry for entry in old if complete or not entry.complete]
        left = [file for file in self._listing() if _LEFT.search(file.base_name) and file.mtime < before]
        if not dry_run:
            for entry in gone:
                self.delete(entry.key)
            for file in left:
                self.folder.delete(file.path[len(self.folder.path) + 1 :])
        return gone + [Entry(file.base_name, file.size or 0, file.mtime, False) for file in left]

    def _listing(self) -> Iterator[pafs.FileInfo]:
        try:
            yield from self.folder.infos()
        except StorageError as error:
            raise StorageError(f"the video store: {error}") from error

    def _stat(self, key: str) -> pafs.FileInfo:
        try:
            file = self.folder.fs.get_file_info(f"{self.folder.path}/{_name(key, 'mp4')}")
        except OSError as error:
            raise StorageError(f"cannot look up {self.uri(key)}: {error}") from error
        if file.type != pafs.FileType.File:
            raise VideoMissing(f"no {_name(key, 'mp4')} in the video store {self.folder.uri}")
        return file

    def _problem(self, entry: Entry) -> str | None:
        try:
            self._together(entry.key)
        except (VideoMissing, VideoDamaged) as error:
            return str(error)
        return None

    def _info(self, entry: Entry) -> dict[str, Any] | None:
        try:
            return self.info(entry.key)
        except VideoMissing:
            return None

    def _together(self, key: str) -> tuple[dict[str, Any], bytes]:
        """A sidecar and the bytes that belong to it, even while they are replaced.

        Raises:
            VideoMissing, VideoDamaged: see `read`.
        """
        info = self.info(key)
        while True:
            try:
                return info, self._checked(key, info)
            except VideoDamaged as damage:
                try:
                    after = self._sidecar(key, _name(key, f"{damage.sha256}.json"))
                except VideoMissing:
                    after = self.info(key)  # it may have been moved into place
                if after == info:
                    raise
                info = after

    def _checked(self, key: str, info: dict[str, Any]) -> bytes:
        data = self._read(_name(key, "mp4"))
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != info["length"]:
            message = f"{self.uri(key)} has {len(data)} bytes, {info['length']} were written"
            raise VideoDamaged(message, digest)
        if digest != info["sha256"]:
            raise VideoDamaged(f"{self.uri(key)} has other bytes than were written", digest)
        return data

    def _read(self, name: str) -> bytes:
        try:
            return self.folder.read(name)
        except FileNotFoundError as error:
            raise VideoMissing(f"no {name} in the video store {self.folder.uri}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.folder.at(name)}: {error}") from error


def _name(key: str, suffix: str) -> str:
    if not (key.isascii() and key.isalnum()):
        raise ValueError(f"not a video key: {key!r}")
    return f"{key[:2]}/{key}.{suffix}"
