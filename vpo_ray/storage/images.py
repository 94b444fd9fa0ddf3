"""The images of a run's queries: `images/<sha256>.<kind>`, in the run directory that all rounds share."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vpo_ray.files.folder import Folder, StorageError
from vpo_ray.files.image_files import image_hash, image_name, is_image_name
from vpo_ray.recipe import Recipe
from vpo_ray.recipe.text import Images
from vpo_ray.storage.run_dir import RunDir


class ImageStore:
    """Images by name. Picklable; any number of processes may use one at once.

    Args:
        uri: a local folder or a URI that `pyarrow.fs` opens. It is made by the first `put`.
    """

    def __init__(self, uri: str | Path) -> None:
        self.folder = Folder(uri)

    def put(self, data: bytes) -> str:
        """Store an image, and return its name.

        Raises:
            ImageError: see `image_files.image_name`.
            StorageError: it cannot be written.
        """
        name = image_name(data)
        self.keep(name, data)
        return name

    def keep(self, name: str, data: bytes) -> None:
        """Store an image that has been decoded already, under its name. Raises StorageError."""
        if not self.folder.exists(name):
            self.folder.write(name, data)

    def sizes(self) -> dict[str, int]:
        """The images that are there, by name, with their bytes. Raises StorageError."""
        files = ((info.base_name, info.size or 0) for info in self.folder.infos())
        return {name: size for name, size in files if is_image_name(name)}

    def read(self, name: str) -> bytes:
        """The bytes of an image, which are those that its name says.

        Raises:
            StorageError: it is not there, or damaged.
        """
        try:
            data = self.folder.read(name)
        except OSError as error:
            raise StorageError(f"cannot read the image {self.folder.at(name)}: {error}") from error
        if hashlib.sha256(data).hexdigest() != image_hash(name):
            raise StorageError(
                f"{self.folder.at(name)} has other bytes than its name says: put the image back, or delete "
                "the run directory"
            )
        return data


def images_of(run: RunDir) -> ImageStore:
    """The images of a run; its rounds, evolutions and evaluations have the same."""
    return ImageStore(run.root()[0].at("images"))


def shown_images(recipe: Recipe, run: RunDir, images: Images) -> str | None:
    """URI of the images that a model is shown, whose section says `images`; None where there are none."""
    none = recipe.queries.image_column is None or images == "ignore"
    return None if none else images_of(run).folder.uri
