"""The image of a request: a `data:` URI that is looked at before anything else is, and never an address.

It has the limits of a query's image in a recipe (`files.image_files`). Its hash is part of what a query is.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from vpo_ray.engines.video.image_need import ImageNeed, image_need
from vpo_ray.files.folder import join
from vpo_ray.files.image_files import (
    MAX_BYTES,
    TOO_LARGE,
    ImageError,
    data_uri,
    image_hash,
    image_name,
    of_data_uri,
)
from vpo_ray.recipe import Serve
from vpo_ray.serve.errors import ApiError
from vpo_ray.storage.images import ImageStore

# Of a body with images of MAX_BYTES together: four characters for three bytes, some of them escaped.
MAX_IMAGE_CHARS = MAX_BYTES * 3 // 2
# Images that a replica decodes at once; one of 50 million pixels takes 200 MB meanwhile.
DECODED_AT_ONCE = 2

NO_IMAGES = "this endpoint's policy sees no images: send the query as text alone"
NOT_FETCHED = "is an address, and nothing is fetched: send the image itself, as a data: URI in base64"
_ADDRESS = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class AttachedImage:
    """An image as a request has it, unread.

    Attributes:
        text: a `data:` URI, or its base64 alone.
        param: where the request has it.
    """

    text: str
    param: str


@dataclass(frozen=True)
class GivenImage:
    """An image that has been decoded once: its name, `<sha256>.<kind>`, and its bytes."""

    name: str
    data: bytes

    @property
    def digest(self) -> str:
        return image_hash(self.name)

    @property
    def part(self) -> dict[str, Any]:
        """It as a part of a message to another endpoint."""
        return {"type": "image_url", "image_url": {"url": data_uri(self.name, self.data)}}


def takes_images(settings: Serve) -> bool:
    """Whether requests may have images. Settings of a running endpoint say what its checkpoint is
    (`app.as_seen`)."""
    return settings.images == "show"


def film_need(settings: Serve) -> ImageNeed | None:
    """What the video model of `/v1/videos` does with images; None where it is not known, or there is none."""
    render = settings.videos.render if settings.videos is not None else None
    return None if render is None else image_need(render.located())


def films_images(settings: Serve) -> bool:
    """Whether a request for a video may have an image, as far as the video model is known. A policy that
    reads writes its prompt from the words then."""
    return settings.videos is not None and film_need(settings) != "none"


def image_room(taken: bool) -> int:
    """Bytes that the images of a body may take, where any are taken."""
    return MAX_IMAGE_CHARS if taken else 0


def check_film(settings: Serve, has_image: bool, param: str = "image") -> None:
    """Raises ApiError (400) where the video model takes no image and there is one, or needs one and there is
    none."""
    need = film_need(settings)
    if has_image and need == "none":
        message = f"{param}: this endpoint's video model takes no images: send the query as text alone"
        raise ApiError(400, message, param, "images_not_supported")
    if need == "required" and not has_image:
        message = f"{param}: this endpoint's video model makes videos from images: send one"
        raise ApiError(400, message, param, "image_required")


def film_images(settings: Serve) -> ImageStore:
    """The images of `/v1/videos`, in `images/` of the video store."""
    assert settings.videos is not None
    return ImageStore(join(settings.videos.store, "images"))


def no_images(param: str) -> ApiError:
    return ApiError(400, f"{param}: {NO_IMAGES}", param, "images_not_supported")


def refuse_other_images(body: Any) -> None:
    """Raises ApiError (422) where a body of our own routes has an image by another API's name, which would
    be ignored."""
    for name in ("image_url", "input_reference"):
        if isinstance(body, dict) and body.get(name) is not None:
            raise ApiError(422, f"{name}: of another API; give the image itself as `image`", name)


def digest_of(image: GivenImage | None) -> str | None:
    return None if image is None else image.digest


class ImageReader:
    """Reads the images of a replica's requests, a few at a time, beside its event loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(DECODED_AT_ONCE)

    async def read(self, image: AttachedImage | None) -> GivenImage | None:
        """The image, once all of it has been decoded. Raises what `read_image` raises."""
        if image is None:
            return None
        async with self._places:
            return await asyncio.to_thread(read_image, image)


def read_image(image: AttachedImage) -> GivenImage:
    """Decode an image of a request.

    Raises:
        ApiError: 400 for an address, bad base64, or what is no PNG, JPEG or WebP; 413 for one that is, or
            claims to be, larger than `image_files` allows.
    """
    if _ADDRESS.match(image.text):
        message = f"{image.param}: {image.text[:60]!r} {NOT_FETCHED}"
        raise ApiError(400, message, image.param, "invalid_image_url")
    try:
        bare = image.text[:5].lower() != "data:"
        data = of_data_uri(f"data:image/png;base64,{image.text}" if bare else image.text)
        return GivenImage(image_name(data), data)
    except ImageError as error:
        status, code = (413, "image_too_large") if error.reason == TOO_LARGE else (400, "invalid_image")
        raise ApiError(status, f"{image.param}: {error}", image.param, code) from None


async def stored_image(settings: Serve, name: str | None) -> GivenImage | None:
    """An image of a job. Raises StorageError where it is not there."""
    if name is None:
        return None
    return GivenImage(name, await asyncio.to_thread(film_images(settings).read, name))


async def keep_image(settings: Serve, image: GivenImage | None) -> str | None:
    """Store the image of a job, and return its name. Raises StorageError."""
    if image is None:
        return None
    await asyncio.to_thread(film_images(settings).keep, image.name, image.data)
    return image.name
