"""What users say of answers: `POST /v1/feedback`, and what is kept for it. Off unless a recipe has it.

Rows are appended to the store in parts, at most `FLUSH_S` seconds after they came, and when a replica ends in
order; one that is killed loses what is younger. An image of a query waits in memory with its row.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from vpo_ray.files.folder import StorageError
from vpo_ray.prompts.conditions import NONE, Conditions
from vpo_ray.recipe import Feedback, Serve
from vpo_ray.records import Row, content_id, normalise
from vpo_ray.serve.answer_ids import AnswerIds
from vpo_ray.serve.errors import ApiError, explained
from vpo_ray.serve.images import GivenImage, digest_of
from vpo_ray.serve.keys import ANYONE, Key
from vpo_ray.serve.optimize_schema import Optimization
from vpo_ray.serve.request import RequestBody, Text, read_json
from vpo_ray.storage.feedback_tables import FeedbackTables
from vpo_ray.storage.tables import Table

logger = logging.getLogger("ray.serve")

FLUSH_S, FLUSH_ROWS = 5.0, 500
# Rows that wait at most while the store does not answer; more are dropped, and counted in the log.
MOST_ROWS = 20_000
# And bytes of their images: of what is beyond, a hash alone is kept.
MOST_IMAGE_BYTES = 256 * 2**20


class FeedbackRequest(RequestBody):
    """What a user says of an answer: at least one of rating, chosen, edited and comment."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    rating: Literal["up", "down"] | None = None
    chosen: (
        Annotated[int, Field(ge=0, le=64, description="0 is the prompt, 1 the first alternative")] | None
    ) = None
    edited: Annotated[Text, Field(min_length=1, max_length=8000)] | None = None
    comment: Annotated[Text, Field(min_length=1, max_length=2000)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.rating is None and self.chosen is None and self.edited is None and self.comment is None:
            raise ValueError("give at least one of rating, chosen, edited and comment")
        return self


class FeedbackDesk:
    """Notes answers, and takes what is said of them.

    Raises:
        SecretMissing: see `AnswerIds`.
    """

    def __init__(self, settings: Feedback) -> None:
        self.settings, self.ids = settings, AnswerIds(settings.secret_env)
        tables = FeedbackTables(settings.store)
        self.answers, self.opinions = (_Appender(tables, t) for t in (tables.answers, tables.opinions))

    def allows(self, key: Key) -> bool:
        """Whether the owner of a key allows that its queries and answers are kept and learnt from."""
        return self.settings.anyone if key == ANYONE else key.feedback

    def note(
        self,
        key: Key,
        query: str,
        answer: Optimization,
        conditions: Conditions = NONE,
        image: GivenImage | None = None,
    ) -> Optimization:
        """Keep an answer of an optimised query, with what its request wished, and the query's image where
        the recipe says so; returns it with its id."""
        if not answer.prompt or answer.fallback or answer.skipped or not self.allows(key):
            return answer
        plain = self.settings.queries == "plain"
        if not plain and normalise(query) in map(normalise, (answer.prompt, *answer.alternatives)):
            return answer  # its text is the query's
        digest = digest_of(image)
        id = self.ids.make(key.name, query, answer, digest)
        row: Row = {
            "answer_id": id.partition(".")[0],
            "key": key.name,
            "time": time.time(),
            "checkpoint": answer.system_fingerprint or answer.model,
            "query_hash": content_id("query", query, *([] if digest is None else [digest])),
            "image": digest,
            "image_name": self.answers.hold(image) if self.settings.images else None,
            "query": query if plain else None,
            "conditions": conditions.dump() if plain else None,
            "prompt": answer.prompt,
            "alternatives": answer.alternatives,
            "safety": answer.safety.outcome,
        }
        self.answers.add(row)
        return answer.model_copy(update={"id": id})

    def take(self, key: Key, body: bytes) -> None:
        """Keep what a request says.

        Raises:
            ApiError: 400 or 422 for a body that is none, 404 for an answer that this key did not get, 403
                where its owner does not allow it.
        """
        try:
            said = FeedbackRequest.model_validate(read_json(body))
        except ValidationError as error:
            raise explained(error, 422) from None
        if not self.allows(key):
            message = "this key does not allow that feedback is kept: its line has no feedback=yes"
            raise ApiError(403, message, code="feedback_not_allowed")
        answer = self.ids.check(key.name, said.id)
        if answer is None:
            raise ApiError(404, "no answer of this key has this id", "id", "answer_not_found")
        given = said.model_dump(exclude={"id"})
        row = {
            "opinion_id": content_id("opinion", answer, sorted(given.items())),
            "answer_id": answer,
            "key": key.name,
            "time": time.time(),
            **given,
        }
        self.opinions.add(row)

    async def close(self) -> None:
        """Write what waits, at a replica's end."""
        await asyncio.gather(self.answers.close(), self.opinions.close())


class _Appender:
    """Appends rows to a table of a store in the background, some at a time."""

    def __init__(self, tables: FeedbackTables, table: Table) -> None:
        self.tables, self.table = tables, table
        self.rows: dict[str, Row] = {}
        self.images: dict[str, bytes] = {}
        self.without_image = 0
        self.task: asyncio.Task[None] | None = None
        self.dropped, self.closing = 0, asyncio.Event()

    def add(self, row: Row) -> None:
        if len(self.rows) >= MOST_ROWS:
            self.dropped += 1
            return
        self.rows.setdefault(str(row[self.table.key]), row)
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._flush_soon())

    def hold(self, image: GivenImage | None) -> str | None:
        """Hold the image of a row that is added next; its name, or None where there is no room for it."""
        if image is None or image.name in self.images:
            return None if image is None else image.name
        if sum(map(len, self.images.values())) + len(image.data) > MOST_IMAGE_BYTES:
            self.without_image += 1
            return None
        self.images[image.name] = image.data
        return image.name

    async def close(self) -> None:
        self.closing.set()
        if self.task is not None:
            await self.task

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), FLUSH_S)

    async def _flush_soon(self) -> None:
        while self.rows:
            if len(self.rows) < FLUSH_ROWS:
                await self._pause()
            some = dict(list(self.rows.items())[: 10 * FLUSH_ROWS])
            try:
                await asyncio.to_thread(
                    self.tables.append, self.table, list(some.values()), dict(self.images)
                )
            except Exception as error:  # noqa: BLE001  whatever fails, rows wait
                # Another error's message may have a text of a user's.
                why = error if isinstance(error, StorageError) else type(error).__name__
                logger.error("%d rows of feedback wait for %s: %s", len(self.rows), self.table.uri, why)
                if self.closing.is_set():
                    return
                await self._pause()
                continue
            for name in some:
                self.rows.pop(name, None)
            wanted = {row.get("image_name") for row in self.rows.values()}
            self.images = {name: data for name, data in self.images.items() if name in wanted}
            if self.dropped or self.without_image:
                lost = self.dropped, self.without_image, self.table.uri
                logger.error("%d rows and %d images of feedback were dropped: %s was too slow", *lost)
                self.dropped = self.without_image = 0


def feedback_desk(settings: Serve) -> FeedbackDesk | None:
    """The desk of an endpoint that has one."""
    return FeedbackDesk(settings.feedback) if settings.feedback is not None else None


def noted(
    desk: FeedbackDesk | None,
    key: Key,
    query: str,
    answer: Optimization,
    conditions: Conditions = NONE,
    image: GivenImage | None = None,
) -> Optimization:
    """The answer with its id, where the endpoint keeps it; see `FeedbackDesk.note`."""
    return answer if desk is None else desk.note(key, query, answer, conditions, image)
