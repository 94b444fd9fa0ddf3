"""Folders of models that a recipe names, as far as they can be looked at without loading anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from vpo_ray.engines.chat.adapter import AdapterError, adapter_of
from vpo_ray.engines.reward.checkpoint import CheckpointError, check_tensors, read_config, tensor_shapes
from vpo_ray.files.input_files import path_of_uri
from vpo_ray.files.weight_files import folder_problems, lone_problems, tensors_of_folder
from vpo_ray.recipe import ChatModel, Lora

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADAPTER = "adapter_config.json"
# Names of weights that GPTQ, AWQ and bitsandbytes pack; of models within torch's and peft's wrappers.
_PACKED = re.compile(r"\.(qweight|qzeros|SCB|absmax|quant_map)$")
_WRAPPER = re.compile(r"(module\.|_orig_mod\.|base_model\.model\.)+")


def checkpoint_folder(key: str, name: str) -> Iterator[str]:
    """Problems of a folder with `config.json` and weights beside it."""
    path = local_path(name)
    if not path.is_dir():
        yield from _nowhere(key, name)
    elif not (path / "config.json").is_file():
        yield f"{key}: {_other_folder(path, 'config.json')}"
    else:
        yield from (f"{key}: {line}" for line in folder_problems(path))


def policy_folder(key: str, name: str, trained: bool) -> Iterator[str]:
    """Problems of a policy's folder, which training loads by transformers: its weights are in one file or in
    those of an index, and beside an adapter's settings the adapter's base model would be loaded."""
    path = local_path(name)
    if (path / _ADAPTER).is_file():
        yield (
            f"{key}: {name} has an {_ADAPTER}, so it is a LoRA adapter and not a whole model: merge it into "
            "its base model (merge_and_unload of peft), save that with its tokenizer, and name its folder"
        )
        return
    problems = list(checkpoint_folder(key, name))
    yield from problems
    indexed = any((path / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    if trained and path.is_dir() and not problems:
        yield from (f"{key}: {name} {line}" for line in _untrainable(path))
    if trained and path.is_dir() and not problems and not indexed:
        yield (
            f"{key}: {name} has neither model.safetensors nor model.safetensors.index.json, by which "
            "training finds weights: download it again, or save it once with transformers (save_pretrained)"
        )


def _untrainable(folder: Path) -> Iterator[str]:
    """What the names and types of a model's weights say against training it."""
    tensors = tensors_of_folder(folder)
    packed = sorted(name for name, (kind, _) in tensors.items() if _PACKED.search(name) or kind[:2] == "F8")
    # What its config.json says of that is looked at as training does.
    if packed and "quantization_config" not in (folder / "config.json").read_text("utf-8", "replace"):
        yield (
            f"is quantised, by its weights ({packed[0]}): they cannot be trained. Name the model that it was "
            "made from"
        )
    heads = {found[0] if (found := _WRAPPER.match(name)) else "" for name in tensors}
    if tensors and len(heads) == 1 and (head := heads.pop()):
        yield (
            f"has weights whose names all begin with {head!r}, as a wrapper saves them, which nothing loads: "
            "save them without it"
        )


def chat_folder(key: str, model: ChatModel) -> Iterator[str]:
    """Problems of the folder of an LLM that runs here."""
    if model.backend == "vllm":
        yield from llm_folder(f"{key}.model", model.model)


def llm_folder(key: str, name: str) -> Iterator[str]:
    """Problems of a folder that vLLM loads: a whole model, or an adapter with its base model."""
    if not (local_path(name) / _ADAPTER).is_file():
        yield from checkpoint_folder(key, name)
        return
    try:
        adapter = adapter_of(name)
        assert adapter is not None
        adapter.engine_kwargs()
    except AdapterError as error:
        yield f"{key}: {error}"
        return
    binary = (local_path(name) / "adapter_model.bin").is_file()  # which vLLM takes
    yield from (f"{key}: {line}" for line in folder_problems(local_path(name), not binary))
    base = checkpoint_folder(key, adapter.base)
    yield from (f"{line}, which {name}/{_ADAPTER} names as its base model" for line in base)


def pipeline_folder(key: str, name: str) -> Iterator[str]:
    """Problems of a folder with a diffusers pipeline: `model_index.json`, and a folder for each component."""
    path = local_path(name)
    if not path.is_dir():
        yield from _nowhere(key, name)
        return
    if not (path / "model_index.json").is_file():
        yield f"{key}: {_other_folder(path, 'model_index.json')}"
        return
    try:
        index = json.loads((path / "model_index.json").read_text("utf-8"))
        # A component that a model does without is listed as [null, null].
        listed = sorted(part for part, kind in index.items() if isinstance(kind, list) and any(kind[:1]))
    except (ValueError, AttributeError) as error:
        yield f"{key}: {path / 'model_index.json'} is no index of a pipeline: {error}"
        return
    components = [part for part in listed if not part.startswith("_")]
    if absent := [part for part in components if not (path / part).is_dir()]:
        yield f"{key}: {name} lacks the component {', '.join(absent)} of its model_index.json"
    for part in components:
        if part not in absent:
            yield from (f"{key}: {line}" for line in _component(path / part))


def _component(folder: Path) -> Iterator[str]:
    """Of a model, a tokenizer or a scheduler, each of which has a configuration under a name of its own."""
    is_model = (folder / "config.json").is_file()
    if not is_model and not any(folder.glob("*_config.json")):
        yield f"{folder} has no config.json"
        return
    binary = any(folder.glob("*.bin"))  # which diffusers takes
    yield from folder_problems(folder, is_model and not binary)


def reward_folder(key: str, name: str) -> Iterator[str]:
    """What of a folder is not that of a VisionReward: configuration, names and shapes of its weights."""
    path = local_path(name)
    try:
        check_tensors(path, tensor_shapes(read_config(path)))
    except CheckpointError as error:
        yield f"{key}: {' '.join(str(error).split())}"
        return
    if not (path / "tokenizer.json").is_file():
        yield f"{key}: {name} has no tokenizer.json, the only kind of tokenizer that this reward reads"


def lora_problems(key: str, settings: Lora) -> Iterator[str]:
    """Problems of a video model's LoRA, as the engine reads it: a safetensors file, or a folder with one that
    has to be named where there are several."""
    path = local_path(settings.path)
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if settings.weight_name is not None:
            names = [settings.weight_name]
            if not (path / settings.weight_name).is_file():
                yield f"{key}.weight_name: {settings.path} has no {settings.weight_name}"
                return
        if len(names) != 1:
            given = f"has {', '.join(names) or 'none'}"
            yield f"{key}.path: {settings.path} {given}; name one of *.safetensors with weight_name"
            return
        path /= names[0]
    elif path.is_file():
        if path.suffix != ".safetensors":
            yield f"{key}.path: {settings.path} is no *.safetensors file"
            return
    else:
        if ("://" not in settings.path or settings.path.startswith("file://")) and not HUB_ID.fullmatch(
            settings.path
        ):
            yield f"{key}.path: no such file or folder: {settings.path}"
        return
    yield from (f"{key}.path: {line}" for line in lone_problems(path))


def local_path(name: str) -> Path:
    """A folder or file by its path or `file://` URI."""
    return Path(path_of_uri(name) if name.startswith("file://") else name)


def _nowhere(key: str, name: str) -> Iterator[str]:
    if is_path(name):
        yield f"{key}: no such folder: {name}"


def is_path(name: str) -> bool:
    """Whether a name is of this machine alone, and neither another's URI nor a hub id."""
    return name.startswith("file://") or ("://" not in name and not HUB_ID.fullmatch(name))


def _other_folder(path: Path, marker: str) -> str:
    """A folder that lacks a file, and those in it that have one: a hub's cache, a run, several adapters."""
    within = [place.parent for depth in ("*", "*/*") for place in path.glob(f"{depth}/{marker}")]
    found = [str(place) for place in sorted(within)[:3]]
    named = f"; did you mean {' or '.join(found)}?" if found else ""
    return f"{path} is no checkpoint folder of this kind, it has no {marker}{named}"
