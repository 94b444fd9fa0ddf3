"""What converters of published rewards share: the work at hand, names of tensors, and what a kind is."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_ray.files.pickles import read_pickle

PICKLED = "pickled.tmp"
_LISTED = 5


class ConvertError(ValueError):
    """A checkpoint that is not what its kind is; the message says what is missing or too much."""


@dataclass
class Conversion:
    """A conversion under way.

    Args:
        source: what the user gave: a file or a folder.
        folder: where results are written, which becomes the target when all is there.
        base: the folder of the model that the weights are for.
    """

    source: Path
    folder: Path
    base: Path | None = None

    def tensors(self, path: Path, stand_ins: bool = False) -> tuple[Path, list[str]]:
        """A safetensors file with the tensors of `path`, and the classes that were stood in for."""
        if path.suffix == ".safetensors":
            return path, []
        found = self.folder / PICKLED
        return found, read_pickle(path, found, stand_ins)


@dataclass(frozen=True)
class RewardKind:
    """How a kind is converted. `write` fills the folder, and gives the card's own entries and source files.

    Args:
        says: what the card says of how the weights are used.
        template: the name of upstream's prompt in its Python file, and the first digits of its sha256.
    """

    write: Callable[[Conversion], tuple[dict[str, Any], list[Path]]]
    says: Mapping[str, str]
    template: tuple[str, str] | None = None


def check_names(found: Iterable[str], wanted: Iterable[str], what: Path) -> None:
    """Raises ConvertError for names of tensors that are missing, or that nothing is known of."""
    problems = {
        "missing": sorted(set(wanted) - set(found)),
        "unknown": sorted(set(found) - set(wanted)),
    }
    lines = [
        f"{len(names)} {word}: {', '.join(names[:_LISTED])}" + (", ..." if names[_LISTED:] else "")
        for word, names in problems.items()
        if names
    ]
    if lines:
        raise ConvertError(f"{what}: its tensors are not those of this kind; {'; '.join(lines)}")


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header. Raises ConvertError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{path} is no safetensors file: {error}") from error


def read_all(path: Path) -> dict[str, Any]:
    """Every tensor of a safetensors file, without what training wraps around names."""
    from safetensors.torch import load_file

    shapes_in(path)
    found: dict[str, Any] = load_file(path)
    for prefix in ("state_dict.", "model_state_dict.", "module."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_texts(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and index of a folder: what stands beside weights and is no code."""
    for path in sorted(source.iterdir() if source.is_dir() else ()):
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.is_file():
            shutil.copy(path, target / path.name)
