"""Images of users: which are taken, how they are decoded safely, and what they are called.

An image is PNG, JPEG or WebP. Its name is the SHA-256 of its bytes with its kind as the ending, so that a
name says what is in a file and one image has one name everywhere. Its header is read before its pixels, so
that a small file which claims a huge picture costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
# What PIL calls a format, and the ending of its files, which is also that of its media type.
KINDS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
_NAME = re.compile(rf"[0-9a-f]{{64}}\.(?:{'|'.join(KINDS.values())})")
_DATA_URI = re.compile(r"data:image/(?:png|jpe?g|webp)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)


class ImageError(ValueError):
    """An image that is not taken. `reason` is a word or two that can be counted; the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


TOO_LARGE, BROKEN = "image too large", "broken image"


def image_name(data: bytes) -> str:
    """The name of an image, once all of it has been decoded.

    Raises:
        ImageError: no PNG, JPEG or WebP, cut off or damaged, or larger than MAX_BYTES or MAX_PIXELS.
    """
    kind, _ = _opened(data)
    return f"{hashlib.sha256(data).hexdigest()}.{KINDS[kind]}"


def is_image_name(text: str) -> bool:
    """Whether a text has the form of an image's name, and so leads out of no folder."""
    return _NAME.fullmatch(text) is not None


def image_hash(name: str) -> str:
    """The SHA-256 in an image's name, 64 hex digits."""
    return name.partition(".")[0]


def decode_image(data: bytes) -> Image:
    """The picture as RGB: turned as its EXIF says, on white where it is transparent; of an animation, the
    first frame.

    Raises:
        ImageError: see `image_name`.
    """
    from PIL import Image, ImageOps

    _, picture = _opened(data)
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        picture = ground
    return picture.convert("RGB")


def cover(picture: Image, width: int, height: int) -> Image:
    """A picture of this size: scaled to cover it, and the middle of what is over."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def encode_png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def media_type(name: str) -> str:
    """That of an image, by its name."""
    return f"image/{name.rpartition('.')[2]}"


def data_uri(name: str, data: bytes) -> str:
    """An image as OpenAI's image parts carry it."""
    return f"data:{media_type(name)};base64,{base64.b64encode(data).decode()}"


def of_data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI of an image.

    Raises:
        ImageError: it is another kind of URI, no base64, or longer than MAX_BYTES.
    """
    found = _DATA_URI.match(uri)
    if found is None:
        raise ImageError(
            BROKEN, "an image is given as a data: URI of image/png, image/jpeg or image/webp in base64"
        )
    # Four characters for three bytes; said before anything is decoded.
    if (len(uri) - found.end()) * 3 // 4 > MAX_BYTES:
        raise ImageError(TOO_LARGE, f"an image has at most {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(uri[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(BROKEN, f"the image is no base64: {error}") from error


def _opened(data: bytes) -> tuple[str, Image]:
    """PIL's name of the format, and the loaded picture."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise ImageError(TOO_LARGE, f"{len(data)} bytes, an image has at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            picture = Image.open(io.BytesIO(data), formats=tuple(KINDS))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ImageError(TOO_LARGE, f"{width} x {height} pixels, an image has at most {MAX_PIXELS}")
        kind = str(picture.format)
        picture.load()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE, f"an image has at most {MAX_PIXELS} pixels: {error}") from error
    except UnidentifiedImageError:  # its message has an address of memory
        raise ImageError(BROKEN, "no PNG, JPEG or WebP that can be read") from None
    except Exception as error:
        raise ImageError(BROKEN, f"no PNG, JPEG or WebP that can be read: {error}") from error
    return kind, picture
