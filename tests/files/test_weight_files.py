"""Folders of models as people have them are told from whole ones by their files alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_ray.files.weight_files import folder_problems

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2298536\n"
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(16)


def index(folder: Path, *shards: str) -> None:
    tree = {"metadata": {}, "weight_map": {name: name for name in shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree), "utf-8")


def files(**contents: bytes | str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("__", ".").replace("_of_", "-of-")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def both(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for step in steps:
            step(folder)

    return write


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shards(folder: Path) -> None:
    for name in SHARDS:
        (folder / name).write_bytes(WHOLE)


FINE = {
    "one file": files(model__safetensors=WHOLE),
    "shards": both(shards, lambda f: index(f, *SHARDS)),
    "shards in a folder of their own": lambda f: (
        (f / "parts").mkdir(),
        (f / "parts/one.safetensors").write_bytes(WHOLE),
        index(f, "parts/one.safetensors"),
    ),
    "shards without an index": shards,
    "a pointer that an index passes over": both(
        shards, lambda f: index(f, *SHARDS), files(consolidated__safetensors=POINTER)
    ),
    "pointers that nothing reads": files(
        model__safetensors=WHOLE, pytorch_model__bin=POINTER, model__fp16__safetensors=POINTER
    ),
    "a slow tokenizer's pointer beside a fast one": files(
        model__safetensors=WHOLE, tokenizer__json="{}", tokenizer__model=POINTER
    ),
    "a link into a cache": lambda f: (
        (f.parent / "blob").write_bytes(WHOLE),
        (f / "model.safetensors").symlink_to("../blob"),
    ),
}
BROKEN = {
    "nothing": (files(config__json="{}"), "FOLDER holds no weights (*.safetensors)"),
    "binary": (files(pytorch_model__bin=b""), "but pytorch_model.bin: save it as safetensors"),
    "gguf": (files(m__Q4_K_M__gguf=b""), "but m.Q4_K_M.gguf: save it"),
    "pointers": (
        files(model__safetensors=POINTER, tokenizer__json=POINTER),
        "FOLDER has git-LFS pointers in the place of model.safetensors, tokenizer.json: run `git lfs pull`",
    ),
    "a slow tokenizer's pointer": (
        files(model__safetensors=WHOLE, tokenizer__model=POINTER),
        "pointers in the place of tokenizer.model",
    ),
    "cut": (files(model__safetensors=WHOLE[:-5]), f"has {len(WHOLE) - 5} of {len(WHOLE)} bytes"),
    "cut within the header": (files(model__safetensors=WHOLE[:20]), "breaks off after 20 bytes"),
    "empty": (files(model__safetensors=b""), "model.safetensors is empty: download it again"),
    "a page": (files(model__safetensors="<html>not found</html>"), "is no safetensors file"),
    "a header of no tensors": (
        files(model__safetensors=(2).to_bytes(8, "little") + b"[]"),
        "is no safetensors file",
    ),
    "a shard of an index": (
        both(shards, lambda f: index(f, *SHARDS, "model-3.safetensors")),
        "FOLDER lacks model-3.safetensors: download it again",
    ),
    "a shard by its number": (
        both(shards, lambda f: (f / SHARDS[0]).unlink()),
        f"FOLDER lacks {SHARDS[0]}",
    ),
    "an index": (
        both(shards, files(model__safetensors__index__json="{")),
        "FOLDER lacks a readable model.safetensors.index.json",
    ),
    "a dangling link": (
        lambda f: (f / "model.safetensors").symlink_to("../blobs/gone"),
        "is a link to a file that is not there",
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_a_folder_that_loads_is_fine(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "with a # and ünïcode"
    folder.mkdir()
    FINE[name](folder)
    assert list(folder_problems(folder)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_does_not_load_is_told(name: str, tmp_path: Path) -> None:
    change, says = BROKEN[name]
    change(tmp_path)
    [line] = folder_problems(tmp_path)
    assert says.replace("FOLDER", str(tmp_path)) in line


def test_a_tokenizer_has_no_weights(tmp_path: Path) -> None:
    assert list(folder_problems(tmp_path, weights=False)) == []
    (tmp_path / "spiece.model").write_text(POINTER, "utf-8")
    assert len(list(folder_problems(tmp_path, weights=False))) == 1


def test_no_weights_are_read(tmp_path: Path) -> None:
    size = 2**40
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    assert list(folder_problems(tmp_path)) == []
