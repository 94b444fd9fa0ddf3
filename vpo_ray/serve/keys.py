"""API keys: who may call the endpoint. Made by `vpo key NAME`, read from a file or mounted Secret.

A line is `NAME SHA256 [option=value ...]`; the key itself is printed once and stored nowhere. Keys have 256
random bits, so a plain hash cannot be searched. The source is read again when it changes: removing a line
revokes the key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_ray.files.text_files import TextFileError, lines, read_text
from vpo_ray.serve.errors import ApiError

logger = logging.getLogger("ray.serve")

PREFIX = "vpo-"
SCOPES = ("optimize", "videos")
# Seconds between two looks at the source, and how long a revoked key may still work.
LOOK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
    """A file of keys that cannot be used; the message says why."""


@dataclass(frozen=True)
class Key:
    """A caller. Limits that are None are the recipe's."""

    name: str
    digest: str
    requests_per_minute: int | None = None
    concurrency: int | None = None
    feedback: bool = False
    scopes: tuple[str, ...] = SCOPES


ANYONE = Key("anyone", "")


def make_key(name: str) -> tuple[str, str]:
    """A new key, and its line for the file of keys. Raises KeyFileError for a bad name."""
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{name!r} cannot name a key: use up to 64 letters, digits, dots, dashes")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} {_digest(key)}"


def parse_line(line: str) -> Key:
    """The key of a line. Raises KeyFileError with the fault; the message has no digest."""
    name, *rest = line.split()
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{name[:64]!r} is not a name for a key")
    if not rest or not _DIGEST.fullmatch(rest[0]):
        raise KeyFileError(
            f"{name}: the name is followed by 64 hex digits; make a line with `vpo key {name}`"
        )
    numbers: dict[str, int] = {}
    feedback = False
    scopes: tuple[str, ...] = SCOPES
    for option in rest[1:]:
        field, _, value = option.partition("=")
        if (
            field in ("requests_per_minute", "concurrency")
            and value.isascii()
            and value.isdigit()
            and int(value)
        ):
            numbers[field] = int(value)
        elif option in ("feedback=yes", "feedback=no"):
            feedback = value == "yes"
        elif field == "scopes" and set(value.split(",")) <= set(SCOPES):
            scopes = tuple(value.split(","))
        else:
            raise KeyFileError(
                f"{name}: {option[:64]!r} is no option; there are requests_per_minute=N, concurrency=N, "
                f"feedback=yes and scopes={','.join(SCOPES)}"
            )
    return Key(name, rest[0], **numbers, feedback=feedback, scopes=scopes)


class KeyRing:
    """The current keys of a file, or of all files of a folder.

    Args:
        source: a file, or a folder as Kubernetes mounts a Secret (names with a leading dot are its
            own).
        now: a clock in seconds.

    Raises:
        KeyFileError: no such file, a bad line, or no key at all. Later, while serving, a bad line, or a file
            of a folder that cannot be read, is logged and skipped, and a missing source admits nobody.
    """

    def __init__(self, source: str | Path, now: Callable[[], float] = time.monotonic) -> None:
        if "://" in str(source):
            raise KeyFileError(
                f"serve.keys: {source} is a URI: name a file or folder of this machine, which is checked "
                "every second"
            )
        self.source, self._now = Path(source).expanduser(), now
        self._looked = now()
        self._unread: list[str] = []
        if not self.source.exists():
            raise KeyFileError(
                f"serve.keys: {self.source} does not exist; `vpo key NAME` makes a line for it"
            )
        self._seen, texts, self._unread = self._read()
        if self._unread:
            raise KeyFileError(f"serve.keys: {'; '.join(self._unread)}")
        self._keys, faults = _parse(texts)
        if faults or not self._keys:
            raise KeyFileError(f"serve.keys: {self.source}: {'; '.join(faults) or 'it holds no key'}")

    def find(self, authorization: str | None) -> Key:
        """The caller of a request by its `Authorization` header.

        Raises:
            ApiError: 401 without a key or with an unknown one. Every known key is compared, in
                constant time.
        """
        self._look()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            message = "no API key: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="missing_api_key", headers=CHALLENGE)
        digest = _digest(given.strip())
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise ApiError(401, "this API key is not known", code="invalid_api_key", headers=CHALLENGE)
        return found[0]

    def _look(self) -> None:
        if self._now() - self._looked < LOOK_EVERY_S:
            return
        self._looked = self._now()
        seen, texts, unread = self._read(self._seen)
        if seen == self._seen and not unread and not self._unread:
            return
        for fault in unread:
            if fault not in self._unread:
                logger.error("a file of keys cannot be read, its keys are not admitted: %s", fault)
        changed = (seen, unread) != (self._seen, self._unread)
        self._seen, self._unread = seen, unread
        self._keys, faults = _parse(texts)
        if not changed:
            return
        logger.info("%s was read again: %d keys", self.source, len(self._keys))
        for fault in faults:
            logger.error("%s: left out, %s", self.source, fault)

    def _read(self, before: object = None) -> tuple[object, list[tuple[str, str]], list[str]]:
        """A state that changes with the files, the name and text of each (unless unchanged), and why files
        cannot be read; those are looked at again each time."""
        try:
            files = [self.source]
            if self.source.is_dir():
                files = sorted(f for f in self.source.iterdir() if f.is_file() and not f.name.startswith("."))
        except OSError as error:
            return [], [], [str(error)]
        seen = [_state(file) for file in files]
        if seen == before and not self._unread:
            return seen, [], []
        texts, unread = [], []
        for file in files:
            try:
                texts.append((file.name, read_text(file)))
            except (OSError, TextFileError) as error:
                unread.append(str(error))
        return seen, texts, unread


def _state(file: Path) -> tuple[Any, ...]:
    """What changes with a file; only its name where it is not there any more."""
    try:
        stat = file.stat()
    except OSError:
        return (str(file),)
    return (str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino)


CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _parse(texts: Iterable[tuple[str, str]]) -> tuple[list[Key], list[str]]:
    keys, faults = [], []
    for name, text in texts:
        for number, line in enumerate(lines(text), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                keys.append(parse_line(line))
            except KeyFileError as error:
                faults.append(f"{name} line {number}: {error}")
    return keys, faults


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
