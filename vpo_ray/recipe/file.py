"""A recipe's file: YAML in, `key.path=value` overrides on top, before `recipe.py` validates it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vpo_ray.files.text_files import NotTextError, TextFileError, read_text

_SHIPPED = Path(__file__).parents[1] / "data" / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used. The message names the file, the key and the fix."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def shipped(name: str | Path) -> Path | None:
    """The recipe of the package that a bare name means: one that no file here has."""
    return None if Path(name).is_file() else shipped_recipes().get(str(name))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in a recipe of the package by its bare name. Raises RecipeError for
    any other file."""
    if (ours := shipped(path)) is None and Path(path).name == str(path) and not Path(path).exists():
        names = ", ".join(shipped_recipes())
        raise RecipeError(f"{path}: no such file, and no recipe of the package; these are {names}")
    try:
        tree = load_yaml(read_text(ours or path))
    except NotTextError as error:
        raise RecipeError(f"{path}: not a YAML file: {error.reason}") from error
    except TextFileError as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error.reason})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(tree, dict):
        what = "an empty file" if tree is None else type(tree).__name__
        raise RecipeError(f"{path}: a recipe is a YAML mapping of sections, this is {what}")
    return tree


def set_key(tree: dict[str, Any], item: str) -> None:
    """Apply one `key.path=value` to the tree, sections made as needed. Raises RecipeError."""
    key, sign, text = item.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {item}: write it as key.path=value, e.g. --set render.steps=30")
    try:
        value = load_yaml(text)
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
    """The value of a YAML text. Raises yaml.YAMLError, also for a key that is given twice, a date that no
    calendar has, and brackets in brackets without end."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("its brackets are too deep") from error
    except ValueError as error:
        raise yaml.YAMLError(
            f"{error}: a text that looks like a date or a number needs quotation marks"
        ) from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would quietly take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.MarkedYAMLError(problem=f"`{key}` is given twice", problem_mark=node.start_mark)
        return node
