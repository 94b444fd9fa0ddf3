"""A recipe's file: YAML in, `key.path=value` overrides on top, before `recipe.py` validates it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vpo_ray.files.text_files import NotTextError, TextFileError, read_text


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names the file, the key and the fix."""


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError for any other file."""
    try:
        tree = load_yaml(read_text(path))
    except NotTextError as error:
        raise RecipeError(f"{path}: not a YAML file: {error.reason}") from error
    except TextFileError as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error.reason})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping of sections, this is {type(tree).__name__}")
    return tree


def set_key(tree: dict[str, Any], item: str) -> None:
    """Apply one `key.path=value` to the tree, sections made as needed. Raises RecipeError."""
    key, sign, text = item.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {item}: write it as key.path=value, e.g. --set render.steps=30")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {item}: the value is not YAML: {error}") from error
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        section = {} if node.get(parent) is None else node[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"--set {item}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        # A YAML alias is one object in several places: the copy changes in this one only.
        node[parent] = node = dict(section)
    node[leaf] = value


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for a key that is given twice."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would quietly take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.MarkedYAMLError(problem=f"`{key}` is given twice", problem_mark=node.start_mark)
        return node
