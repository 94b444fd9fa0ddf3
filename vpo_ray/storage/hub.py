"""Downloads of models from a Hugging Face hub and of files by https, resumed and checked by their hashes,
and uploads to a hub.

The hub says of every file its size and its hash (SHA-256 of large files, git's of small ones). It is that of
HF_ENDPOINT, the token that of HF_TOKEN or of `hf auth login`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Literal

from vpo_ray.files.folder import Folder, StorageError

logger = logging.getLogger(__name__)

MANIFEST = "vpo-fetch.json"  # beside a model in a store

_CHUNK = 8 * 2**20
_TIMEOUT_S = 60
# What repositories of models hold for other libraries and for people.
_OTHERS = re.compile(
    r".*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|ot|tflite|mp4|gif|png|jpe?g|webp)|original/.*|(.*/)?\.git\w+"
)
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)(?=[.-])")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `sha256` is of a large file's content; of others `blob` is git's hash."""

    name: str
    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class HubModel:
    """What a hub has of a model at one commit, as far as the engines read it."""

    model: str
    revision: str | None
    commit: str
    files: tuple[HubFile, ...]
    license: str | None
    gated: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)


def hub_model(model: str, revision: str | None = None) -> HubModel:
    """What the hub has of a model.

    Raises:
        StorageError: no such model or revision, no permission, no weights as safetensors, or no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=_endpoint())
    try:
        info = api.model_info(model, revision=revision)
        tree = api.list_repo_tree(model, revision=info.sha, recursive=True)
        files = [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
    except Exception as error:  # whatever the client of the hub raises
        raise StorageError(_why(model, revision, error)) from error
    kept = tuple(_read_by_engines(files))
    if not any(file.name.endswith(".safetensors") for file in kept):
        raise StorageError(f"{model}: the hub has no *.safetensors of it, and no other weights are read")
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license")
    return HubModel(model, revision, str(info.sha), kept, licence, bool(info.gated))


def download_model(found: HubModel, folder: str | Path | None = None) -> str:
    """Download a model, or what is left of it, and check every file. Returns its local folder.

    Args:
        folder: where to; the hub's own cache when None, in which engines find it by its id.

    Raises:
        StorageError: it does not arrive, or a file is not what the hub says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        path = snapshot_download(
            found.model,
            # By its name, so that the cache knows which commit that is.
            revision=found.revision if folder is None else found.commit,
            local_dir=folder,
            allow_patterns=[_literally(file.name) for file in found.files],
            endpoint=_endpoint(),
        )
    except Exception as error:  # whatever the client of the hub raises
        raise StorageError(_why(found.model, found.revision, error)) from error
    check_files(found, path)
    return path


def push_folder(
    folder: Path, repo: str, kind: Literal["model", "dataset"], private: bool, message: str
) -> str:
    """Commit a folder's files to a repository of the hub, which is made if it is not there; one that is there
    keeps its visibility and its other files. Returns its address.

    Raises:
        StorageError: the hub does not take it: no token, no permission, no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=_endpoint())
    try:
        url = str(api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever the client of the hub raises
        where = _endpoint() or "https://huggingface.co"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            raise StorageError(f"{repo} at {where}: set HF_TOKEN to a token that may write there") from error
        why = " ".join(str(error).split())[:300]
        raise StorageError(f"{repo} at {where}: {type(error).__name__}: {why}") from error
    return url


def check_files(found: HubModel, folder: str | Path) -> None:
    """Raises StorageError for the files of a model that are missing or are not what the hub says; damaged
    ones are removed, so that the next download brings them anew."""
    wrong = []
    for file in found.files:
        path = Path(folder, file.name)
        if not path.is_file():
            wrong.append(f"{file.name} is missing")
        elif not is_file_of_hub(path, file):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            wrong.append(f"{file.name} has another hash")
    if wrong:
        raise StorageError(
            f"{found.model} in {folder}: {'; '.join(wrong)}. The same command fetches it again"
        )


def is_file_of_hub(path: Path, file: HubFile) -> bool:
    """Whether a local file has the size and the hash that the hub gives."""
    size = path.stat().st_size
    if size != file.size:
        return False
    digest = (
        hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    )
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.blob)


def is_stored(found: HubModel, folder: Folder) -> bool:
    """Whether all of a model is in a store: its manifest, which is written last, and every file's size."""
    try:
        if not folder.exists(MANIFEST) or folder.read_json(MANIFEST) != _manifest(found):
            return False
        sizes = {info.path[len(folder.path.rstrip("/")) + 1 :]: info.size for info in folder.infos()}
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot look into {folder.uri}: {error}") from error
    return all(sizes.get(file.name) == file.size for file in found.files)


def store_model(found: HubModel, path: str | Path, folder: Folder) -> None:
    """Copy a downloaded model to a store. Raises StorageError."""
    for file in found.files:
        try:
            with Path(path, file.name).open("rb") as stream:
                with folder.fs.open_output_stream(f"{folder.path}/{file.name}") as out:
                    while chunk := stream.read(_CHUNK):
                        out.write(chunk)
        except OSError as error:
            raise StorageError(f"cannot write {folder.at(file.name)}: {error}") from error
    folder.write_json(MANIFEST, _manifest(found))


def _manifest(found: HubModel) -> dict[str, Any]:
    files = {file.name: [file.size, file.sha256 or file.blob] for file in found.files}
    return {"model": found.model, "commit": found.commit, "files": files}


def file_size(url: str) -> int | None:
    """Bytes of a file at a URL, None where its server does not say. Raises StorageError."""
    try:
        with urllib.request.urlopen(_request(url, "HEAD"), timeout=_TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code in (400, 403, 405, 501):  # a signed address, and some servers, are for GET alone
            return None
        raise StorageError(f"{url}: {error}") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{url}: {error}") from error
    return int(length) if length else None


def download_file(url: str, target: str | Path, sha256: str | None = None) -> str:
    """Download a file, or what is left of it, and check it. Returns its SHA-256.

    Args:
        target: appears whole or not at all; what has arrived so far is in `target.part`, and what its server
            calls this version of it in `target.part.version`. Without a hash, a download goes on only where
            the server still has that version.

    Raises:
        StorageError: it does not arrive or has another hash; or plain http without a hash.
    """
    target = Path(target)
    if url.lower().startswith("http://") and sha256 is None:
        raise StorageError(
            f"{url}: http without a hash can be anything; write https, or #sha256=... behind it"
        )
    if target.is_file():
        return _checked(target, sha256, url)
    part = target.with_name(f"{target.name}.part")
    note = part.with_name(f"{part.name}.version")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        version = note.read_text("latin-1") if note.exists() else ""
        have = part.stat().st_size if part.exists() and (version or sha256) else 0
        with urllib.request.urlopen(_request(url, "GET", have, version), timeout=_TIMEOUT_S) as answer:
            goes_on = answer.status == 206
            if have and not goes_on:
                logger.info("%s: its server cannot go on, so it begins anew", url)
            if not goes_on:
                part.unlink(missing_ok=True)  # another version's
                note.write_text(_version(answer.headers), "latin-1")
            with part.open("ab" if goes_on else "wb") as out:
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
            left = answer.length  # what was promised and did not come
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left: all of it is in the part
            raise StorageError(f"{url}: {error}") from error
        left = 0
    except OSError as error:
        raise StorageError(f"{url}: {error}; the same command goes on") from error
    if left:
        raise StorageError(f"{url} broke off with {left} bytes left; the same command goes on")
    found = _checked(part, sha256, url)
    part.replace(target)
    note.unlink(missing_ok=True)
    return found


def _version(headers: Message) -> str:
    """What `If-Range` may name: a strong ETag, or a date. Empty where there is none."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _checked(path: Path, sha256: str | None, url: str) -> str:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 is not None and found != sha256.lower():
        if path.name.endswith(".part"):
            path.unlink()
        raise StorageError(
            f"{path} has SHA-256 {found}, and {url} is to have {sha256}: remove it, or the hash"
        )
    return found


def _request(url: str, method: str, offset: int = 0, version: str = "") -> urllib.request.Request:
    headers = {"User-Agent": "vpo-ray", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    return urllib.request.Request(url, headers=headers, method=method)


def _read_by_engines(files: Iterable[HubFile]) -> Iterable[HubFile]:
    """Without what is for other libraries or people, other precisions, and single files that repeat a
    pipeline's folders. A component of a pipeline that has no safetensors is loaded from its `*.bin`."""
    files = list(files)
    names = {file.name for file in files}
    pipeline = "model_index.json" in names
    safe = {os.path.dirname(name) for name in names if name.endswith(".safetensors")}
    for file in files:
        name, folder = file.name, os.path.dirname(file.name)
        twice = bool(_VARIANT.search(name)) and _VARIANT.sub("", name) in names
        lone = pipeline and not folder and name.endswith(".safetensors")
        only = pipeline and name.endswith(".bin") and f"{folder}/config.json" in names and folder not in safe
        if (only or not _OTHERS.fullmatch(name)) and not twice and not lone:
            yield file


def _literally(name: str) -> str:
    """A pattern of fnmatch that matches the name alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _why(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{_endpoint() or 'https://huggingface.co'}/{model}"
    if isinstance(error, GatedRepoError):
        return f"{model} is gated: accept its licence at {where}, and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return f"{model}: no such model at {where}, or it is private: set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{model}: no revision {revision!r} at {where}"
    why = " ".join(str(error).split())[:300]
    return f"{model} at {where}: {type(error).__name__}: {why}; the same command goes on"
