"""Input files of users: finding and opening them.

A path is a file, a glob or a folder (a Hugging Face dataset saved to disk, or as on the hub), on a local disk
(`~` is the user's home), on a store that `pyarrow.fs` opens (`s3://`, `gs://`), or on any other that fsspec
knows (`https://`). A file that ends in .gz, .bz2, .xz or .zst is decompressed while it is read. `text_files`
reads text, `record_files` reads rows.
"""

from __future__ import annotations

import bz2
import functools
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

# Errors of reading and decompressing a file. pyarrow's are OSError or ValueError, with one exception.
READ_ERRORS = (OSError, EOFError, ValueError, ImportError, NotImplementedError, zlib.error, lzma.LZMAError)

# Files without data in a dataset's folder.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class InputError(ValueError):
    """Input that cannot be read, or lacks what is needed; the message says what to do."""


def why_unreadable(error: BaseException) -> str:
    """Why a file cannot be read, without the file's name."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it cannot be read: {error}"


@dataclass(frozen=True)
class InputFile:
    """A file: its path, and the URI that its filesystem is opened from (None for a local one)."""

    path: str
    root: str | None = None

    def __str__(self) -> str:
        """The path or URI, as messages name it."""
        if self.root is None or "://" in self.path:
            return self.path
        scheme = urlsplit(self.root).scheme
        return f"{scheme}://{self.path if scheme == 'file' else self.path.lstrip('/')}"

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.path).path if "://" in self.path else self.path).name

    @property
    def packing(self) -> str:
        """The ending of the compression: ".gz", ".bz2", ".xz", ".zst" or ""."""
        ending = PurePosixPath(self.name).suffix.lower()
        return ending if ending in _UNPACKERS else ""

    @property
    def kind(self) -> str:
        """The ending of the format in lower case, such as ".jsonl"."""
        return PurePosixPath(self.name[: len(self.name) - len(self.packing)]).suffix.lower()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """A stream of the file's decompressed bytes. It and its reads raise READ_ERRORS."""
        with open(self.path, "rb") if self.root is None else _opened(self.path, self.root) as stream:
            if not self.packing:
                yield stream
                return
            with _UNPACKERS[self.packing](stream) as unpacked:
                yield unpacked

    def size(self) -> int:
        """Bytes; 0 if unknown."""
        try:
            fs = None if self.root is None else filesystem(self.root)[0]
            return Path(self.path).stat().st_size if fs is None else fs.size(self.path) or 0
        except OSError:
            return 0


def file_at(source: str | os.PathLike[str]) -> InputFile:
    """The one file at a path or URI. Raises InputError for a URI that cannot be opened."""
    text = os.fspath(source)
    if "://" not in text:
        return InputFile(os.path.expanduser(text))
    return InputFile(filesystem(text)[1], text)


def find_files(
    patterns: str | Sequence[str], key: str, kinds: Container[str], any_kind: bool = False
) -> list[InputFile]:
    """The files of some paths, in order, those of a glob or folder by name; each file once.

    Args:
        key: the recipe's key of the paths, for messages.
        kinds: endings of files with data; in a folder, others are skipped.
        any_kind: a file that is named itself may have any ending.

    Raises:
        InputError: nothing there, a filesystem that cannot be opened, or a kind that is not known.
    """
    files: list[InputFile] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern:
            raise InputError(f"{key} is empty: name a file, a glob or a folder")
        try:
            if pattern.startswith("file://"):
                found = _local_uri(pattern, kinds)
            elif "://" in pattern:
                found = _remote(pattern, kinds)
            else:
                found = _local(os.path.expanduser(pattern), kinds)
        except READ_ERRORS as error:
            # Does not repeat a password.
            where = key if "must not hold a password" in str(error) else f"{key} {pattern}"
            raise InputError(f"{where}: {why_unreadable(error)}") from error
        if not found:
            raise InputError(f"{key} {pattern}: no file matches")
        files += found
    for file in files:
        if file.kind not in kinds and not any_kind:
            known = ", ".join(kinds) if isinstance(kinds, Iterable) else ""
            raise InputError(f"{key} {file}: unknown kind; use one of {known}, or a folder of them")
    once: dict[tuple[str | None, str], InputFile] = {}
    for file in files:
        once.setdefault((file.root, os.path.realpath(file.path) if file.root is None else file.path), file)
    return list(once.values())


# Finding files


def walk(
    folder: Path,
    entered: Callable[[Path], bool] = lambda _: True,
    every_name: bool = False,
    folders: bool = False,
) -> Iterator[Path]:
    """Paths in a local folder, by name. Links are followed, except one to a folder that contains it.

    Args:
        entered: whether to descend into a folder, the first one included.
        every_name: yield a folder with several names (by links) under each; else under one, preferably not
            a link.
        folders: yield folders too, before their content.
    """
    yield from _walk(folder, entered, folders, [] if every_name else None, set())


def _walk(
    folder: Path,
    entered: Callable[[Path], bool],
    folders: bool,
    above: list[tuple[int, int]] | None,
    seen: set[tuple[int, int]],
) -> Iterator[Path]:
    try:
        found = folder.stat()
        this = (found.st_dev, found.st_ino)
        if this in (seen if above is None else above) or not entered(folder):
            return
        seen.add(this)
        with os.scandir(folder) as entries:
            # Links come last, so that a folder is yielded under its own name if possible.
            inside = sorted((entry.is_symlink(), entry.name, _leads_to_folder(entry)) for entry in entries)
    except FileNotFoundError:
        return  # it was deleted meanwhile
    if folders:
        yield folder
    for _, name, is_folder in inside:
        if is_folder:
            yield from _walk(folder / name, entered, folders, None if above is None else [*above, this], seen)
        else:
            yield folder / name


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _local(pattern: str, kinds: Container[str]) -> list[InputFile]:
    if Path(pattern).is_dir():
        paths = _data_files(pattern, map(str, walk(Path(pattern))), kinds)
        if absent := next((path for path in paths if not os.path.exists(path)), None):
            raise InputError(f"{absent} is a broken link")
        return [InputFile(path) for path in paths]
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [InputFile(pattern)]
    return [file for path in sorted(matches(pattern)) for file in _local(path, kinds)]


def _local_uri(uri: str, kinds: Container[str]) -> list[InputFile]:
    """As on other filesystems, a glob of a URI matches files only."""
    path = path_of_uri(uri)
    if Path(path).exists() or not glob.has_magic(path):
        return _local(path, kinds)
    return [InputFile(one) for one in sorted(matches(path)) if os.path.isfile(one)]


def path_of_uri(uri: str) -> str:
    """The local path that a `file://` URI names."""
    return unquote(uri.removeprefix("file://").partition("?")[0])


def matches(pattern: str) -> list[str]:
    """Paths that match a glob. `**` is any folders, each once; Python's own follows cycles of links."""
    absolute = os.path.isabs(pattern)
    paths, parts = [os.sep if absolute else ""], Path(pattern).parts[absolute:]
    for number, part in enumerate(parts, start=1):
        if part == "**":
            tops = [Path(top or ".") for top in paths if os.path.isdir(top or ".")]
            below = [path for top in tops for path in walk(top, _is_visible, folders=True)]
            last = number == len(parts)
            paths = list(
                dict.fromkeys(str(path) for path in below if path.is_dir() or (last and path.is_file()))
            )
        elif glob.has_magic(part):
            paths = [
                os.path.join(top, name) for top in paths for name in glob.glob(part, root_dir=top or ".")
            ]
        else:
            paths = [path for top in paths if os.path.lexists(path := os.path.join(top, part))]
    return paths


def _is_visible(folder: Path) -> bool:
    return not folder.name.startswith(".") or folder.name in ("", ".", "..")


def _remote(uri: str, kinds: Container[str]) -> list[InputFile]:
    location, question, options = uri.partition("?")
    parts = location.split("/")
    first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), None)
    root = "/".join(parts[:first]) + question + options
    fs, path = filesystem(root)
    if first is not None:
        found = fs.glob("/".join([path.rstrip("/"), *parts[first:]]), detail=True)
        names = sorted(name for name, info in found.items() if info["type"] == "file")
    # A web server has no folders; asking for one would fetch the file.
    elif not location.startswith("http") and fs.isdir(path):
        names = _data_files(path, fs.find(path), kinds)
    else:
        names = [path]
    return [InputFile(name, root) for name in names]


def _data_files(folder: str, paths: Iterable[str], kinds: Container[str]) -> list[str]:
    """The data files of a folder, without metadata, hidden files and caches; only columnar ones if any."""
    data: list[InputFile] = []
    for path in sorted(paths):
        file, relative = InputFile(path), PurePosixPath(path[len(folder) :].lstrip("/"))
        hidden = any(part.startswith((".", "_")) for part in relative.parts)
        cache = file.kind == ".arrow" and file.name.startswith("cache-")
        if not hidden and not cache and file.name not in _METADATA and file.kind in kinds:
            data.append(file)
    columnar = [file.path for file in data if file.kind in (".parquet", ".arrow")]
    return columnar or [file.path for file in data]


@functools.lru_cache(maxsize=64)
def filesystem(uri: str) -> tuple[Any, str]:
    """An fsspec filesystem and the path in it. pyarrow's own filesystems come first.

    Raises:
        InputError: a password in the URI, which would appear in logs, or an unknown filesystem.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.fs as pafs
    from fsspec.implementations.arrow import ArrowFSWrapper

    if urlsplit(uri).password is not None:
        raise InputError("a URI must not hold a password: give credentials by the environment")
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            return cast(tuple[Any, str], fsspec.core.url_to_fs(uri))
        except (ValueError, ImportError) as error:
            raise InputError(f"it cannot be opened: {error}") from error
    return ArrowFSWrapper(fs), path


def _opened(path: str, root: str) -> Any:
    try:
        return filesystem(root)[0].open(path, "rb")
    except READ_ERRORS:
        raise
    except Exception as error:  # each filesystem has its own errors, such as aiohttp's
        raise OSError(f"it cannot be read: {error}") from error


# Compression


def _zstandard(stream: Any) -> Any:
    import pyarrow as pa

    return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(stream, "zstd")))


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
