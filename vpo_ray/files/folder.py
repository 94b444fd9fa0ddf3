"""A folder on a local disk or in an object store, in which files are written atomically.

Everything goes through `pyarrow.fs`, so a folder is a local one or a URI (`s3://bucket/runs/a`, `gs://...`).
On a local disk a file is written under another name, flushed and renamed, so that even a power cut leaves the
old file or the new one. Object stores publish an object when its upload is complete; an existing one is
replaced by a copy within the store.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from vpo_ray.files.input_files import walk

T = TypeVar("T")

READS = 3  # tries to read an object that changes meanwhile


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Rows in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class StorageError(RuntimeError):
    """A folder or object that cannot be read or written; the message says which and why."""

    stops_run = True  # see stream/stops.py


class DamagedError(StorageError, ValueError):
    """A file with the wrong content; the message says which."""


def join(uri: str, name: str) -> str:
    """The path or URI of `name` in a folder. Options of a URI (`?endpoint_override=...`) stay at its end."""
    place, sign, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{place.rstrip('/')}/{name}{sign}{options}"


def beside(uri: str, name: str) -> str:
    """The path or URI of `name` in the parent of a folder, followed by that folder's own name."""
    place, sign, options = uri.partition("?") if "://" in uri else (uri, "", "")
    above, _, own = place.rpartition("/")
    return f"{above}/{name}/{own}{sign}{options}"


def parent_of(uri: str) -> str:
    """The parent of a folder."""
    place, sign, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{place.rstrip('/').rpartition('/')[0]}{sign}{options}"


def flush(path: str | Path) -> None:
    """Flush a local file, or a folder's entries, to the disk. Raises OSError (full)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some shared filesystems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(file)


def share(folder: Path) -> None:
    """Give a local folder and all in it the permissions that new ones get here: safetensors writes files that
    nobody but their owner can read, and temporary folders are the same."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with suppress(OSError):  # a filesystem without permissions
                path.chmod(path.stat().st_mode | (mode if path.is_dir() else mode & 0o666))


class Folder:
    """A folder on any filesystem that `pyarrow.fs` opens. Picklable; cheap to make.

    Args:
        uri: a local path or a URI, with options as pyarrow takes them, such as
            `s3://bucket/path?endpoint_override=host:port&scheme=http`. Credentials come from the
            environment, where pyarrow looks for them.

    Raises:
        StorageError: no name, a URI of an unknown filesystem, without a bucket or with a password, a bucket
            that is not found, or the home of an unknown user.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if not text or "\0" in text:
            # An empty variable of a script would otherwise mean the working directory.
            raise StorageError(f"{text!r} names no folder: give a path or a URI")
        if "://" in text:
            place, sign, options = text.partition("?")
            self.uri = f"{place.rstrip('/')}{sign}{options}"
            if "://" not in self.uri:
                raise StorageError(f"{text} names no bucket: write it as {place.rstrip('/')}//bucket/folder")
        else:
            try:
                self.uri = str(Path(text).expanduser().resolve())
            except RuntimeError as error:
                raise StorageError(f"cannot open {text}: nobody here has such a home folder") from error
        self._open()

    def _open(self) -> None:
        remote = "://" in self.uri
        uri = self.uri if remote else Path(self.uri).as_uri()
        if uri.startswith("s3://"):
            # A small object is then one request, not an upload of one part.
            uri += f"{'&' if '?' in uri else '?'}allow_delayed_open=true"
        if remote and urlsplit(self.uri).password is not None:
            # It would appear in tables, logs and the report.
            raise StorageError("a URI must not hold a password: give credentials by the environment")
        try:
            self.fs, self.path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"cannot open {self.uri}: {error}") from error

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return (type(self), (self.uri,))

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.at(name))

    def at(self, name: str) -> str:
        """The path or URI of a file or folder in this one."""
        return join(self.uri, name)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def is_objects(self) -> bool:
        """Whether this is an object store: no folders, and an object appears when its upload is complete."""
        return self.fs.type_name in ("s3", "gcs", "abfs")

    def write(self, name: str, data: bytes) -> int | None:
        """Write one file atomically. Raises StorageError (read-only, full, no access).

        Returns:
            The file's modification time in ns; None on an object store, where it would cost a request.
        """
        target = f"{self.path}/{name}"
        # A leading dot hides leftovers of a kill from readers of the folder as a Parquet dataset.
        folder, base = os.path.split(target)
        written = f"{folder}/.{base[:40]}.{uuid.uuid4().hex}.tmp"
        opened = whole = False
        modified: int | None = None
        try:
            if not self.is_objects:
                self._make_folder(folder)
            elif self.fs.get_file_info(target).type != pafs.FileType.File:
                # Leaving the block below closes the stream, and with that the store publishes what it has
                # got so far: an object that is there is replaced by a whole one only.
                written = target
            with self.fs.open_output_stream(written) as stream:
                opened = True
                stream.write(data)
                whole = True
            if not self.is_objects:
                if self.is_local:
                    flush(written)
                modified = self.fs.get_file_info(written).mtime_ns
                self.fs.move(written, target)
                if self.is_local:
                    flush(folder)
            elif written != target:
                self.fs.copy_file(written, target)
                self.fs.delete_file(written)
        except BaseException as error:
            if written != target or (opened and not whole):
                with suppress(OSError):
                    self.fs.delete_file(written)
            if isinstance(error, OSError):
                raise StorageError(f"cannot write {self.at(name)}: {error}") from error
            raise
        return modified

    def _make_folder(self, path: str) -> None:
        """Create a folder and its parents, flushed to the disk."""
        if not self.is_local:
            self.fs.create_dir(path, recursive=True)
        elif not os.path.isdir(path):
            above = os.path.dirname(path)
            self._make_folder(above)
            self.fs.create_dir(path, recursive=False)
            flush(above)

    def delete(self, name: str) -> None:
        """Delete a file, which may be gone already. Raises StorageError."""
        try:
            self.fs.delete_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot delete {self.at(name)}: {error}") from error

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError, or OSError if it cannot be read."""
        path = f"{self.path}/{name}"
        if not self.is_objects:
            with self.fs.open_input_stream(path) as stream:
                return stream.read()
        # An object may be gone, or be another, since it was opened. pyarrow then gives an error, or as many
        # bytes as there were before, whatever they are.
        failure: OSError | None = None
        for _ in range(READS):
            with self.fs.open_input_stream(path) as stream:
                try:
                    data = stream.read()
                except OSError as error:
                    failure = error
                    continue
            if self.fs.get_file_info(path).size == len(data):
                return data
        raise failure or OSError(f"{path} changes whenever it is read")

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises StorageError where it cannot be told."""
        try:
            return self.fs.get_file_info(f"{self.path}/{name}").type == pafs.FileType.File
        except OSError as error:
            raise StorageError(f"cannot look for {self.at(name)}: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The JSON value of a file. Raises FileNotFoundError, or DamagedError if it is not JSON."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{self.at(name)} is damaged, it is not JSON: {error}") from error

    def files(self, suffix: str = "") -> list[str]:
        """Sorted relative names of all files below this folder; none if it is absent.

        Raises:
            StorageError: the folder cannot be listed.
        """
        base = len(self.path) + 1
        return sorted(i.path[base:] for i in self.infos() if i.path.endswith(suffix))

    def folders(self) -> list[str]:
        """Sorted names of the folders in this one; none if it is absent. Raises StorageError."""
        try:
            infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        except OSError as error:
            raise StorageError(f"cannot list {self.uri}: {error}") from error
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def infos(self) -> list[pafs.FileInfo]:
        """Paths, sizes and times of all files below this folder; none if it is absent.

        Links on a local disk are followed, each folder once: pyarrow would follow a cycle of links forever.

        Raises:
            StorageError: the folder cannot be listed.
        """
        try:
            if not self.is_local:
                selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
                infos = self.fs.get_file_info(selector)
            elif os.path.exists(self.path):
                infos = self.fs.get_file_info([str(path) for path in walk(Path(self.path))])
            else:
                infos = []
        except OSError as error:
            raise StorageError(f"cannot list {self.uri}: {error}") from error
        return [info for info in infos if info.type == pafs.FileType.File]
