"""Pictures that the tests of the endpoint send."""

import io
import struct
import zlib

from PIL import Image

from vpo_ray.files.image_files import data_uri, image_name


def picture(colour: str = "red", size: tuple[int, int] = (120, 90), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def uri(data: bytes) -> str:
    return data_uri(image_name(data), data)


def huge_claim() -> bytes:
    """A PNG of a hundred bytes whose header says 60000 x 60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def part(url: str) -> dict[str, object]:
    """An image part of a chat message."""
    return {"type": "image_url", "image_url": {"url": url}}
