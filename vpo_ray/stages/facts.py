"""What a stage's rows are made with beyond the recipe's text, as `made_with` compares it: each fact is a
name for messages and a value. What cannot be read here, where it need not be, is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from vpo_ray.engines.video.weights import sampled
from vpo_ray.files.folder import StorageError
from vpo_ray.files.input_files import READ_ERRORS, file_at, walk
from vpo_ray.prompts.policy_prompt import PromptError, read_prompt
from vpo_ray.recipe import ChatModel, Recipe
from vpo_ray.recipe.plugins import Modelled, PluginError, find
from vpo_ray.records import content_id
from vpo_ray.storage import model_cache
from vpo_ray.versions import short_version

Fact = tuple[str, str]

# Files of a model's folder that decide what it says: weights, configuration, tokenizer, template, code.
_MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".txt", ".model",
                          ".tiktoken", ".jinja", ".py"})  # fmt: skip


def of_judge_prompts(recipe: Recipe) -> Iterator[Fact]:
    yield from of_prompt("judge.critique_prompt", recipe.judge.critique_prompt)
    yield from of_prompt("judge.refine_prompt", recipe.judge.refine_prompt)


def of_chat(where: str, model: ChatModel) -> Iterator[Fact]:
    yield from of_plugin(where, model)
    if model.backend == "vllm":
        yield from of_versions("vllm")
        yield from of_model(f"{where}.model", model.model)


def of_plugin(where: str, section: Modelled) -> Iterator[Fact]:
    """What another's model says that its results depend on; its name and version are in the recipe."""
    if section.is_plugin:
        with suppress(PluginError):
            yield f"{where}.{section.key}", find(section).identity(section)


def of_versions(*names: str) -> Iterator[Fact]:
    yield from ((name, found) for name in names if (found := short_version(name)) is not None)


def of_prompt(key: str, name: str) -> Iterator[Fact]:
    try:
        yield key, content_fact(read_prompt(name))
    except PromptError:
        return  # the stage says so, on the node that reads it


def of_file(key: str, path: str) -> Iterator[Fact]:
    try:
        with file_at(path).open() as stream:
            yield key, content_fact(stream.read().hex())
    except READ_ERRORS:
        return


def of_model(key: str, path: str) -> Iterator[Fact]:
    """A local model is its files: names, sizes, and samples of what is in them. One at a URI is what
    the store says of its files."""
    if "://" in path:
        with suppress(StorageError):
            yield key, f"content {model_cache.version(path)[:12]}"
        return
    place = Path(os.path.expanduser(path))
    if place.exists():
        yield key, content_fact([[name, *sampled(file)] for name, file in _files(place)])


def _files(place: Path) -> Sequence[tuple[str, Path]]:
    if place.is_file():
        return [(place.name, place)]
    files = (path for path in walk(place, every_name=True) if path.suffix in _MODEL_FILES)
    visible = (path for path in files if not path.name.startswith(".") and path.is_file())
    return sorted((str(path.relative_to(place)), path) for path in visible)


def content_fact(value: object) -> str:
    return f"content {content_id(value, digits=12)}"
