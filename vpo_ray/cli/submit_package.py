"""What travels to a cluster with `vpo submit`: the working directory as Ray packs it, and every file here
that the recipe names, or a row of such a file as its image, whatever `.gitignore` or our own list says of it.

What cannot travel (too large, or named by a path that means nothing elsewhere) is refused by name.
"""

from __future__ import annotations

import glob
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpo_ray.cli.submit_images import image_columns, images_of_rows
from vpo_ray.files.input_files import matches, path_of_uri, walk
from vpo_ray.recipe import Recipe, sources
from vpo_ray.recipe.plugins import plugin_sources
from vpo_ray.stream.ray_compat import largest_package, package_rules

logger = logging.getLogger(__name__)

# What does not travel unless the recipe names it (patterns as in .gitignore).
EXCLUDES = [".git", ".venv", "runs", "build", "dist", "__pycache__", "*.egg-info", "*.safetensors", "*.mp4"]
# All files of one key of the recipe together. A package goes through the memory of the cluster's head.
MOST_BYTES = 100 * 2**20

_ADVICE = "put it on storage that every node has, and name that path or URI"
_NETWORK = (
    "nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "fuse", "9p", "virtiofs",
    "wekafs", "orangefs", "pvfs",
)  # fmt: skip


class PackageError(RuntimeError):
    """A recipe whose files cannot travel; the message lists them."""


def write_package(
    recipe: Recipe, recipe_file: Path | None, folder: Path, target: Path, everywhere: Callable[[str], bool]
) -> None:
    """Write the package: a zip file of the working directory and of what the recipe names.

    Equal files give equal bytes, so that Ray uploads the same package once.

    Args:
        recipe_file: resolved; in `folder`. None for a recipe of the package, which every node has.
        folder: the working directory, resolved. A relative path in the recipe is looked for in it, then
            in the current directory; the job finds it under the same relative path.
        everywhere: whether an absolute path that is here is the same on the cluster's nodes.

    Raises:
        PackageError: files that cannot travel, or more than Ray takes.
    """
    files = dict(_left_by_ray(folder))
    named = {} if recipe_file is None else {str(recipe_file.relative_to(folder)): recipe_file}
    problems, columns = [], image_columns(recipe)
    for key, name in (*sources(recipe), *plugin_sources(recipe).items()):
        try:
            found = _named(key, name, folder, everywhere)
            named |= found
            if key in columns:
                named |= _images(key, found, columns[key], everywhere)
        except PackageError as error:
            problems.append(str(error))
    if problems:
        raise PackageError("these would not reach the cluster:\n  " + "\n  ".join(problems))
    if forced := sorted(named.keys() - files.keys()):
        logger.info("named by the recipe, so that they travel, too: %s", _some(forced))
    files |= named
    _write(files, target)
    limit = largest_package()
    if target.stat().st_size >= limit:
        largest = sorted(files, key=lambda name: -files[name].stat().st_size)[:5]
        raise PackageError(
            f"{folder} is {target.stat().st_size / 2**20:.0f} MiB when packed, Ray takes less than "
            f"{limit / 2**20:.0f}. Its largest files are {', '.join(largest)}: name them in "
            ".gitignore or .rayignore, or put them on storage that every node has"
        )


def on_shared_storage(path: str) -> bool:
    """Whether a path is on a network filesystem of this machine."""
    import psutil

    real = os.path.realpath(path)
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    while real not in mounts and real != os.path.dirname(real):
        real = os.path.dirname(real)
    return mounts.get(real, "").lower().startswith(_NETWORK)


def is_node_of(session: str) -> bool:
    """Whether this machine runs a process of the Ray session of that name."""
    import psutil

    mark = f"--session-name={session}"
    return any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


def _left_by_ray(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and empty folders of the working directory by their relative names, as Ray would pack them:
    .gitignore and .rayignore of every folder are obeyed, links are followed."""
    base, own = package_rules(folder, EXCLUDES)
    rules: dict[Path, list[Any]] = {folder.parent: [base]}

    def entered(path: Path) -> bool:
        inherited = rules[path.parent]
        rules[path] = [*inherited, *own(path)]
        return not any(excluded(path) for excluded in rules[path])

    for path in walk(folder, entered, every_name=True, folders=True):
        if not path.is_dir():
            if path.is_file() and not any(excluded(path) for excluded in rules[path.parent]):
                yield str(path.relative_to(folder)), path
        elif path != folder and next(path.iterdir(), None) is None:
            yield str(path.relative_to(folder)), path


def _named(key: str, name: str, folder: Path, everywhere: Callable[[str], bool]) -> dict[str, Path]:
    """The files here of one path of the recipe, by their names in the package.

    Raises:
        PackageError: they cannot travel.
    """
    path = path_of_uri(name) if name.startswith("file://") else name
    if "://" in path:
        return {}
    if os.path.isabs(path):
        found = _files(path)
        if not found or everywhere(path):
            return {}
        inside = Path(os.path.normpath(path))
        hint = _ADVICE
        if inside.is_relative_to(folder):
            hint = f"name it by its path in the working directory, {inside.relative_to(folder)}"
        raise PackageError(f"{key}: {name} is a path of this machine; {hint}")
    relative = os.path.normpath(path)
    bases = [folder, Path.cwd()]
    base, found = next(((b, f) for b in bases if (f := _files(os.path.join(b, relative)))), (folder, []))
    if not found:
        may_be_hub_id = key.endswith((".model", ".lora.path", ".clip", ".dino")) and name.count("/") < 2
        if not name.startswith("builtin:") and not may_be_hub_id:
            logger.warning("%s: %s is not here; the job will look for it as it is", key, name)
        return {}
    if relative.split(os.sep)[0] == os.pardir:
        raise PackageError(
            f"{key}: {name} leads out of the working directory, which is all that travels; "
            f"give --working-dir and a path in it, or {_ADVICE}"
        )
    _check_size(f"{key}: {name} has", found)
    return {str(file.relative_to(base)): file for file in found}


def _images(
    key: str, files: Mapping[str, Path], columns: tuple[str, str], everywhere: Callable[[str], bool]
) -> dict[str, Path]:
    """The images that rows of these files name, by their names in the package. Raises PackageError."""
    found: dict[str, Path] = {}
    for said, place, image in images_of_rows(key, files, columns):
        if os.path.isabs(place):
            if not everywhere(place):
                raise PackageError(f"{key}: the image {said} of a row is a path of this machine; {_ADVICE}")
        elif place.split(os.sep)[0] == os.pardir:
            raise PackageError(
                f"{key}: the image {said} of a row leads out of the working directory, which is all that "
                f"travels; give --working-dir, or {_ADVICE}"
            )
        else:
            found[place] = image
    _check_size(f"{key}: the images of its rows have", list(found.values()))
    return found


def _check_size(what: str, files: Sequence[Path]) -> None:
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise PackageError(
            f"{what} {size / 2**20:.0f} MiB, more than the {MOST_BYTES / 2**20:.0f} that travel; {_ADVICE}"
        )


def _files(pattern: str) -> list[Path]:
    """The files of a path: a file, all of a folder, or what a glob matches; none where nothing is."""
    path = Path(os.path.abspath(pattern))
    if path.is_dir():
        return [file for file in walk(path, every_name=True) if file.is_file()]
    if path.exists() or not glob.has_magic(pattern):
        return [path] if path.is_file() else []
    return [file for one in matches(str(path)) for file in _files(one)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _write(files: dict[str, Path], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for name, path in sorted(files.items()):
            try:
                info = zipfile.ZipInfo(name + "/" * path.is_dir())
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = path.stat().st_mode << 16
                if path.is_dir():
                    package.writestr(info, b"")
                    continue
                info.file_size = path.stat().st_size
                with path.open("rb") as source, package.open(info, "w") as stream:
                    while piece := source.read(1 << 20):
                        stream.write(piece)
            except OSError as error:
                raise PackageError(f"{path} cannot be read: {error.strerror or error}") from error
