"""The images of raw queries: read once, where each row's own path says, checked, and stored by content."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from vpo_ray.files.image_files import MAX_BYTES, ImageError
from vpo_ray.files.input_files import READ_ERRORS, InputError, InputFile, file_at, why_unreadable
from vpo_ray.storage.images import ImageStore

READERS = 8  # images read at once; an object store takes tens of ms for each
MISSING = "no such image"
# A row that names what is not there, or may not be read, costs itself only.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class QueryImages:
    """Takes the images of rows into a store. Picklable.

    Args:
        files: the files of queries; a relative path of an image is one from its file's folder.
        store: URI of the store.
        key: the recipe's key of their column, for messages.
    """

    files: Sequence[InputFile]
    store: str
    key: str = "queries.image_column"

    def take(self, rows: Sequence[tuple[int, str]]) -> list[str | ImageError]:
        """The name of each image in the store, or why it is not taken.

        Args:
            rows: position of the row's file, and the path or URI that the row names.

        Raises:
            InputError: a disk or store that cannot be read now.
            StorageError: the store cannot be written.
        """
        store = ImageStore(self.store)
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(lambda row: self._take(store, *row), rows))

    def _take(self, store: ImageStore, position: int, path: str) -> str | ImageError:
        try:
            file = image_beside(self.files[position], path)
            return store.put(_read(file, self.key))
        except ImageError as error:
            return error


def image_beside(file: InputFile, path: str) -> InputFile:
    """The image that a row of a file names: a URI, an absolute path, or one from the file's own folder.

    Raises:
        ImageError: a URI that cannot be opened.
    """
    if "://" in path:
        try:
            return file_at(path)
        except InputError as error:
            raise ImageError(MISSING, f"{path}: {error}") from error
    if file.root is None:
        return InputFile(_as_written(str(Path(file.path).parent / os.path.expanduser(path))))
    return InputFile(posixpath.join(posixpath.dirname(file.path), path), file.root)


def _as_written(path: str) -> str:
    """A local path, or the same in another normal form of Unicode where only that is there: a copy by macOS
    writes é as two characters."""
    if not os.path.exists(path):
        for form in ("NFC", "NFD"):
            if os.path.exists(other := normalize(form, path)):
                return other
    return path


def _read(file: InputFile, key: str) -> bytes:
    try:
        with file.open() as stream:
            return stream.read(MAX_BYTES + 1)
    except READ_ERRORS as error:
        # A web server says of one file alone that it is not there in many ways.
        named = isinstance(error, OSError) and error.errno in _NO_NAME
        if named or isinstance(error, _ABSENT) or str(file).startswith("http"):
            raise ImageError(MISSING, f"{file}: {why_unreadable(error)}") from error
        raise InputError(f"{key}: {file}: {why_unreadable(error)}") from error
