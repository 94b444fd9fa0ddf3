"""An answer of the engine in parts, for a client that reads at its own pace.

A separate task takes the parts from the engine, so that the time limit covers writing the answer only. A slow
client neither uses it up nor holds the engine, and there is no time limit around a `yield`, where it would
interrupt the reader.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from vpo_ray.serve.errors import ApiError

logger = logging.getLogger("ray.serve")


class Parts(AsyncIterator[str]):
    """Server-sent events, which the reader must close: the engine stops then.

    A failure ends them with an error event, in OpenAI's form and without `[DONE]`.

    Args:
        first, parts: the first part, and the handle's response that gives the others.
        deadline: for the whole answer, by the event loop's clock.
        read: turns a part into an event, or ""; an ApiError from it ends the answer.
        late: the error that a client gets after the deadline.
    """

    def __init__(
        self, first: str, parts: Any, deadline: float, read: Callable[[Any], str], late: ApiError
    ) -> None:
        self._parts, self._read, self._late = parts, read, late
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._queue.put_nowait(first)
        self.ended: float | None = None  # when the answer was complete, by time.perf_counter()
        self._task = asyncio.create_task(self._take(deadline))

    async def __anext__(self) -> str:
        part = await self._queue.get()
        if part is None:
            self._queue.put_nowait(None)  # for the next call
            raise StopAsyncIteration
        return part

    async def aclose(self) -> None:
        """Stop the engine; parts that were not read are lost."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _take(self, deadline: float) -> None:
        failure: ApiError | None = None
        whole = False
        try:
            async with asyncio.timeout_at(deadline):
                async for part in self._parts:
                    if event := self._read(part):
                        self._queue.put_nowait(event)
            whole = True
        except ApiError as error:
            failure = error
        except TimeoutError:
            failure = self._late
        except (RayError, RayServeException) as error:
            logger.error("an answer was interrupted: %s", type(error).__name__)
            failure = ApiError(503, "the answer was interrupted; ask again", code="engine_failed")
        except Exception as error:  # noqa: BLE001  a stream always ends with a result or an error
            logger.error("an answer was interrupted: %s", type(error).__name__)
            failure = ApiError(500, "the endpoint failed; try again")
        finally:
            self.ended = time.perf_counter()
            if not whole:
                self._parts.cancel()
            if failure is not None:
                self._queue.put_nowait(f"data: {json.dumps(failure.body())}\n\n")
            self._queue.put_nowait(None)
