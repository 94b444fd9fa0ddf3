"""`vpo fetch`: download the models and files that a recipe names, sizes and licences first.

A hub's model goes into the hub's own cache, where engines find it by its id; what the recipe looks for at a
path goes there; with `--to` all of it goes to one folder or store. What is there already is checked by its
hashes, and what broke off goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpo_ray.files.folder import Folder
    from vpo_ray.recipe import Recipe
    from vpo_ray.recipe.published import Published
    from vpo_ray.storage.hub import HubModel

HELP = "download the models and files that a recipe names, sizes and licences first"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `vpo fetch` its options."""
    parser.add_argument("--to", metavar="DIR", help="folder or URI for all of it, which every node reads")
    parser.add_argument(
        "--list", action="store_true", help="say what is to be downloaded, and download nothing"
    )


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Download what is not here. Returns 0, or 1 where something failed, which the others do not wait for."""
    from vpo_ray.files.folder import Folder, StorageError
    from vpo_ray.recipe.published import downloads

    wanted, own = downloads(recipe)
    failed: list[str] = []
    models: dict[Published, HubModel] = {}
    total = 0
    for each in wanted:
        try:
            size, licence = _look(each, models)
        except StorageError as error:
            failed.append(f"{', '.join(each.keys)}: {error}")
            continue
        total += size
        _say(f"{', '.join(each.keys)}: {_source(each)}, {_size(size)}, licence: {licence}")
    if wanted:
        _say(f"{_size(total)} in all, as far as the servers say")
    for key, path in own.items():
        _say(f"{key}: {path} is not here, and yours to bring")
    target = Folder(arguments.to) if arguments.to else None
    if not arguments.list:
        _refuse_a_full_disk(total, target)
        for each in wanted:
            if each.model is not None and each not in models:
                continue
            try:
                _bring(each, models.get(each), target)
            except StorageError as error:
                failed.append(f"{', '.join(each.keys)}: {error}")
    for line in failed:
        sys.stderr.write(f"vpo: error: {line}\n")
    return 1 if failed else 0


def _look(each: Published, models: dict[Published, HubModel]) -> tuple[int, str]:
    """Bytes and licence, as the servers have it now. Raises StorageError."""
    from vpo_ray.storage.hub import file_size, hub_model

    if each.model is None:
        return sum(file_size(url) or 0 for url, _ in _urls(each)), each.license
    found = models[each] = hub_model(each.model, each.revision)
    named = found.license or each.license
    gated = "; gated: accept it on the model's page, and set HF_TOKEN" if found.gated else ""
    return found.size, f"{named}, https://huggingface.co/{each.model}{gated}"


def _bring(each: Published, found: HubModel | None, target: Folder | None) -> None:
    """Download one of them and say where it is. Raises StorageError."""
    from vpo_ray.storage import hub

    if found is None:
        where = _bring_file(each, target)
    elif target is None:
        where = hub.download_model(found, each.named if each.is_path else None)
    else:
        name = found.model if found.revision is None else f"{found.model}@{found.revision}"
        folder = target / f"models/{name.replace('/', '--')}"
        where = folder.uri
        if folder.is_local:
            hub.download_model(found, folder.path)
        elif not hub.is_stored(found, folder):
            hub.store_model(found, hub.download_model(found), folder)
    commit = f" at {found.commit[:12]}" if found is not None else ""
    _say(f"{', '.join(each.keys)}: {where}{commit}, checked")
    if target is not None or (found is None and not each.is_path):
        for key in each.keys:
            _say(f"  --set {key}={where}")


def _bring_file(each: Published, target: Folder | None) -> str:
    """Download a file, or make one of several. Returns its path or URI."""
    import tempfile

    from vpo_ray.records import content_id
    from vpo_ray.storage.hub import download_file

    name = (each.named if each.is_path else str(each.url)).partition("?")[0].rpartition("/")[2]
    # Files of one name at two URLs are two.
    place = name if each.is_path else f"{content_id('url', each.url, digits=8)}/{name or 'file'}"
    if target is not None and not target.is_local:
        with tempfile.TemporaryDirectory(prefix="vpo-fetch-") as aside:
            (target / "files").write(place, _made(each, Path(aside, name or "file")).read_bytes())
        return (target / "files").at(place)
    if target is not None:
        path = Path(target.path, "files", place)
    else:
        path = Path(each.named) if each.is_path else Path("fetched", place)
    if each.url is not None:
        said = download_file(each.url, path, each.sha256)
        if each.sha256 is None:
            _say(f"{each.url}: SHA-256 {said}, which nobody published: pin it with #sha256={said}")
        return str(path)
    return str(_made(each, path))


def _made(each: Published, path: Path) -> Path:
    """A downloaded file, or one that is made of others beside it."""
    from vpo_ray.recipe.published import weights_of_all
    from vpo_ray.storage.hub import download_file

    if each.url is not None:
        download_file(each.url, path, each.sha256)
        return path
    parts = []
    for url, sha256 in _urls(each):
        part = path.with_name(url.rpartition("/")[2])
        download_file(url, part, sha256)
        parts.append(part.read_text("utf-8"))
    questions, selected, weights = parts
    path.write_text(json.dumps(weights_of_all(questions, selected, json.loads(weights))), "utf-8")
    return path


def _urls(each: Published) -> Iterator[tuple[str, str | None]]:
    from vpo_ray.recipe.published import published_files

    if each.url is not None:
        yield each.url, each.sha256
    for name in each.made_of:
        entry = published_files()[name]
        yield entry["url"], entry.get("sha256")


def _refuse_a_full_disk(size: int, target: Folder | None) -> None:
    from vpo_ray.files.folder import StorageError

    if target is not None and target.is_local:
        above = next(path for path in (Path(target.path), *Path(target.path).parents) if path.exists())
        if (free := shutil.disk_usage(above).free) < size:
            raise StorageError(
                f"{target.uri} has {_size(free)} free, and the download takes up to {_size(size)}"
            )


def _source(each: Published) -> str:
    if each.model is not None:
        return f"{each.model}{f'@{each.revision}' if each.revision else ''} of the hub"
    return each.url or f"made of {', '.join(each.made_of)}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
