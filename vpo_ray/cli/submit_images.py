"""The images that rows of a recipe's files name: they travel with `vpo submit` as the files do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from vpo_ray.files.input_files import InputError, InputFile
from vpo_ray.files.record_files import READERS, records
from vpo_ray.recipe import EVOLVED, Recipe
from vpo_ray.stages.curate.images import image_beside
from vpo_ray.stages.curate.read import path_of_image
from vpo_ray.storage.sft_data import COLUMNAR


def image_columns(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Keys of files whose rows name images, with the columns of their texts and of their images."""
    found = {"queries.path": (recipe.queries.column, recipe.queries.image_column)}
    if recipe.sft is not None and recipe.sft.data != EVOLVED:
        found["sft.data"] = ("query", recipe.sft.image_column)
    for name, entry in (recipe.evaluate.sets if recipe.evaluate is not None else {}).items():
        found[f"evaluate.sets.{name}.path"] = (entry.column, entry.image_column)
    return {key: (text, image) for key, (text, image) in found.items() if image is not None}


def images_of_rows(
    key: str, files: Mapping[str, Path], columns: tuple[str, str]
) -> Iterator[tuple[str, str, Path]]:
    """The images here that rows name: each as its row has it, its place relative to the working directory
    (an absolute path where the row's is one), and the file. What cannot be read is said where the job runs.

    Args:
        files: by their relative names.
        columns: of texts and of images.
    """
    for name, path in sorted(files.items()):
        file = InputFile(str(path))
        kind = file.kind if file.kind in READERS else ".jsonl" if key == "sft.data" else ""
        if kind not in COLUMNAR:
            continue
        with suppress(InputError):
            for values in records(file, columns, key, kind):
                said = _path(values[1]) if isinstance(values, tuple) else None
                if said is None or "://" in said:
                    continue
                image = Path(image_beside(file, said).path)
                if image.is_file():
                    inside = os.path.join(os.path.dirname(name), os.path.expanduser(said))
                    yield said, os.path.normpath(inside), image


def _path(value: object) -> str | None:
    with suppress(ValueError):
        return path_of_image(value)
    return None
