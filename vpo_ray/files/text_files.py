"""Text files of users: recipes, prompts, checklists, weights, lists of words and of keys.

Text is UTF-8. A byte order mark is removed; one of UTF-16 or UTF-32 is respected. Only `\\n`, with or without
a `\\r` before it, ends a line: `str.splitlines` also splits at U+2028, U+0085 and others, which may occur in
a sentence or in a line of JSON.
"""

from __future__ import annotations

import codecs
import os

from vpo_ray.files.input_files import READ_ERRORS, file_at, why_unreadable

# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextFileError(ValueError):
    """A text file that cannot be read; `reason` says why, the message also names the file."""

    def __init__(self, source: str | os.PathLike[str], why: str) -> None:
        super().__init__(f"cannot read {os.fspath(source)}: {why}")
        self.reason = why


class NotTextError(TextFileError):
    """A file that can be read but is not text in a known encoding."""


def read_text(source: str | os.PathLike[str]) -> str:
    """The text of a file, without byte order mark and with `\\n` as line ends.

    Args:
        source: a local path (`~` is the home) or a URI; see `input_files`.

    Raises:
        TextFileError: no such file, or one that cannot be read.
        NotTextError: not text; the message names the line.
    """
    try:
        with file_at(source).open() as stream:
            raw = stream.read()
    except READ_ERRORS as error:
        raise TextFileError(source, why_unreadable(error)) from error
    return decode(raw, source)


def read_lines(source: str | os.PathLike[str]) -> list[str]:
    """The lines of a file without their ends; see `read_text`."""
    return lines(read_text(source))


def decode(raw: bytes, source: str | os.PathLike[str]) -> str:
    """Text of a file's bytes; see `read_text`. `source` names the file in errors."""
    mark, encoding = encoding_of(raw)
    body = raw[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = body[: error.start].decode(encoding, "replace").count("\n") + 1
        raise NotTextError(
            source, f"line {line} is not {encoding.upper()} text ({error.reason}); save the file as UTF-8"
        ) from error
    if "\x00" in text:
        line = text[: text.index("\x00")].count("\n") + 1
        raise NotTextError(
            source,
            f"line {line} holds a null character: it is no text, or not UTF-8; save the file as UTF-8",
        )
    return text.replace("\r\n", "\n")


def encoding_of(raw: bytes) -> tuple[bytes, str]:
    """The byte order mark that bytes begin with (empty for none), and the encoding: UTF-8 without one."""
    return next(((mark, name) for mark, name in MARKS if raw.startswith(mark)), (b"", "utf-8"))


def lines(text: str, keepends: bool = False) -> list[str]:
    """The lines of a text, which end at `\\n` or `\\r\\n` only.

    A byte order mark at the start of a line is removed: concatenated files have them inside.
    """
    found = text.split("\n")
    last = found.pop()
    ended = [line + "\n" for line in found] if keepends else [line.removesuffix("\r") for line in found]
    return [line.removeprefix("\ufeff") for line in [*ended, *([last] if last else [])]]
