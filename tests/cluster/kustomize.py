"""What our kustomizations use of Kustomize, so that the manifests are tested where it is not installed:
resources, JSON patches and images. Anything else is refused."""

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "resources", "patches", "images"}


class KustomizeError(ValueError):
    """A kustomization that names a file, target or path which does not exist."""


def build(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl kustomize FOLDER` gives, in the order of their files."""
    tree = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    if unknown := set(tree) - KNOWN:
        raise KustomizeError(f"{folder}: {unknown} is not understood here")
    manifests = [made for name in tree["resources"] for made in _resource(folder, name)]
    for patch in tree.get("patches", []):
        text = patch["patch"] if "patch" in patch else _read(folder / patch["path"])
        chosen = [i for i, manifest in enumerate(manifests) if _selected(manifest, patch["target"])]
        if not chosen:
            raise KustomizeError(f"{folder}: no manifest is {patch['target']}")
        for i in chosen:
            try:
                manifests[i] = jsonpatch.JsonPatch(yaml.safe_load(text)).apply(manifests[i])
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                raise KustomizeError(f"{folder}: {patch['target']}: {error}") from error
    for image in tree.get("images", []):
        for manifest in manifests:
            _rename(manifest, image)
    return manifests


def _resource(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return build(path) if path.is_dir() else list(yaml.safe_load_all(_read(path)))


def _read(path: Path) -> str:
    if not path.is_file():
        raise KustomizeError(f"{path} does not exist")
    return path.read_text("utf-8")


def _selected(manifest: dict[str, Any], target: dict[str, str]) -> bool:
    name = manifest["metadata"]["name"]
    return target["kind"] == manifest["kind"] and target.get("name", name) == name


def _rename(node: Any, image: dict[str, str]) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "image" and value == image["name"]:
            node[key] = f"{image['newName']}:{image['newTag']}"
        elif isinstance(value, dict | list):
            _rename(value, image)
