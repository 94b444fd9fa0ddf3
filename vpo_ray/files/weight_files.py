"""The files of a model's folder, looked at without reading their weights: are they there, and whole?

A clone without git-LFS has short texts in the place of large files, and a copy that broke off has parts of
them. A loader would tell what its parser met there, and only once it has a GPU.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = 1024  # bytes at most, by the specification of git-LFS
_HEADER_SIZE = 100_000_000  # bytes at most, by the format of safetensors
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_INDEX = ".safetensors.index.json"
# Where there is one of these names and no index, it is what is loaded.
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
# Kinds of weights that are not read.
_OTHERS = (".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
# What loaders read beside weights; of the tokenizer, the first that is there.
_CONFIGS = ("config.json", "tokenizer_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")
_AGAIN = "run `git lfs pull` there, or download it again"


def folder_problems(folder: Path, weights: bool = True) -> Iterator[str]:
    """A line for each reason why the weights in a folder, or its tokenizer, cannot be read. Weights that
    loaders pass over, because others stand for them, are not looked at.

    Args:
        weights: whether there must be some.

    Raises:
        OSError: the folder cannot be read.
    """
    names = {path.name for path in folder.iterdir()}
    read, absent = _weights(folder, names)
    if absent:
        yield f"{folder} lacks {_some(absent)}: download it again"
    elif weights and not read:
        others = sorted(name for name in names if name.endswith(_OTHERS))
        yield f"{folder} holds no weights (*.safetensors)" + (
            f" but {_some(others)}: save it as safetensors (save_pretrained)" if others else ""
        )
    texts = [name for name in _CONFIGS if name in names] + [n for n in _TOKENIZERS if n in names][:1]
    pointers = [name for name in [*read, *texts] if is_pointer(folder / name)]
    if pointers:
        yield f"{folder} has git-LFS pointers in the place of {_some(pointers)}: {_AGAIN}"
    for name in read:
        if name not in pointers:
            yield from lone_problems(folder / name)


def lone_problems(path: Path) -> Iterator[str]:
    """A line where a safetensors file cannot be read, by its header and its size."""
    if is_pointer(path):
        yield f"{path} is a git-LFS pointer: {_AGAIN}"
        return
    try:
        tensor_headers(path)
    except ValueError as error:
        yield f"{path} {error}: download it again"


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-LFS puts in the place of one that it did not fetch."""
    if not path.is_file() or path.stat().st_size > _POINTER_SIZE:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _weights(folder: Path, names: set[str]) -> tuple[list[str], list[str]]:
    """The names of the weights that a loader reads, and what is not there of them."""
    indices = sorted(name for name in names if name.endswith(_INDEX))
    if indices:
        try:
            tree = json.loads((folder / indices[0]).read_text("utf-8"))
            wanted = {str(name) for name in tree["weight_map"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return [], [f"a readable {indices[0]}"]
    else:
        every = {name for name in names if name.endswith(".safetensors")}
        wanted = every & set(_WHOLE) or every
        for shard in [found for name in wanted if (found := _SHARD.fullmatch(name))]:
            digits, count = len(shard["number"]), int(shard["count"])
            numbers = range(1, count + 1) if count <= 10_000 else ()
            wanted |= {f"{shard['name']}-{n:0{digits}}-of-{shard['count']}.safetensors" for n in numbers}
    there = {name for name in wanted if name in names or os.path.lexists(folder / name)}
    return sorted(there), sorted(wanted - there)


def tensors_of_folder(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As `tensor_headers`, of all files that a loader reads of a folder without problems."""
    read, _ = _weights(folder, {path.name for path in folder.iterdir()})
    return {name: each for file in read for name, each in tensor_headers(folder / file).items()}


def tensor_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type (`BF16`) and the shape of each tensor of a safetensors file, by its name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no whole safetensors file; the message says what it is.
    """
    if not path.is_file():
        raise ValueError("is a link to a file that is not there" if path.is_symlink() else "is not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_SIZE:
            raise ValueError("is no safetensors file" if size else "is empty")
        header = file.read(length)
    if size < 8 + length:
        raise ValueError(f"breaks off after {size} bytes")
    try:
        tensors = {name: each for name, each in json.loads(header).items() if name != "__metadata__"}
        whole = 8 + length + max((int(each["data_offsets"][1]) for each in tensors.values()), default=0)
        found = {name: (str(each["dtype"]), tuple(each["shape"])) for name, each in tensors.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("is no safetensors file") from error
    if size != whole:
        raise ValueError(f"has {size} of {whole} bytes")
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
