"""Ids of answers: they name the checkpoint, the query and the prompt by their content, and cannot be forged.

An id is a hash of the answer and of the caller's name, and a keyed hash of that: so feedback on an answer
is known to come from the key that got it, without looking anything up.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from vpo_ray.records import content_id
from vpo_ray.serve.optimize_schema import Optimization

_DIGITS = 32


class SecretMissing(ValueError):
    """The variable with the secret of ids is not set, or too short to keep one."""


class AnswerIds:
    """Makes and checks ids.

    Args:
        secret_env: name of the environment variable with the secret, the same on every node that serves.

    Raises:
        SecretMissing: it is not set, or has fewer than 16 characters.
    """

    def __init__(self, secret_env: str) -> None:
        secret = os.environ.get(secret_env, "")
        if len(secret) < 16:
            raise SecretMissing(
                f"serve.feedback.secret_env: {secret_env} has no secret of 16 characters or more: set it to "
                "the same on every node, e.g. to what `openssl rand -hex 32` prints"
            )
        self._secret = secret.encode("utf-8", "surrogateescape")

    def make(self, key: str, query: str, answer: Optimization, image: str | None = None) -> str:
        """The id of an answer to a key's query.

        Args:
            image: the hash of the query's image, if it has one.
        """
        parts = (answer.system_fingerprint or answer.model, query, answer.prompt, answer.alternatives)
        name = content_id("answer", key, *parts, *([] if image is None else [image]), digits=_DIGITS)
        return f"{name}.{self._signed(name, key)}"

    def check(self, key: str, given: str) -> str | None:
        """The name of an answer by its id; None for one that this key did not get."""
        name, _, mark = given.partition(".")
        expected = self._signed(name, key)
        return name if hmac.compare_digest(mark.encode(), expected.encode()) else None

    def _signed(self, name: str, key: str) -> str:
        return hmac.new(self._secret, f"{name} {key}".encode(), hashlib.sha256).hexdigest()[:_DIGITS]
