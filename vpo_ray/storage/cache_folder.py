"""The folder for copies of models on a node, which belongs to this user alone.

`VPO_MODEL_CACHE` if it is set, else `vpo_ray/models` in `XDG_CACHE_HOME` (`~/.cache`), else in a folder with
the user's number in the temporary directory, for users without a home. Others who could write there could
replace the user's weights, or code.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from vpo_ray.files.folder import StorageError

VARIABLE = "VPO_MODEL_CACHE"


def cache_folder() -> Path:
    """The cache, a private folder of this user, created if absent.

    Raises:
        StorageError: it belongs to another user, is a link, or is open to others; the message says what to
            do.
    """
    if given := os.environ.get(VARIABLE):
        return _private(Path(given).expanduser().absolute())
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"))
    # Containers often run as a user that has no home.
    if cache.is_absolute():
        with suppress(OSError):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return _private(_private(cache / "vpo_ray") / "models")
    return _private(_private(Path(tempfile.gettempdir(), f"vpo_ray-{os.geteuid()}")) / "models")


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            raise StorageError(f"{folder}, for copies of models, is a link or a file: set {VARIABLE}")
        if found.st_uid != os.geteuid():
            raise StorageError(
                f"{folder}, for copies of models, belongs to user {found.st_uid}: set {VARIABLE} to a "
                "folder of your own"
            )
        if found.st_mode & 0o022:
            raise StorageError(
                f"{folder}, for copies of models, can be written by others: chmod 700 it, or set {VARIABLE}"
            )
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise StorageError(f"cannot keep copies of models in {folder}: {error}; set {VARIABLE}") from error
    return folder
