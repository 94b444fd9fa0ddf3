"""An answer of the engine in parts, for a client that reads them when it likes.

A task of its own takes the parts from the engine. So the time limit is one of writing the answer, and a
client that reads slowly neither uses it up nor holds the engine; and no time limit stands around a
`yield`, where it would end whatever the reader is doing instead.
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
    """Server-sent events, to be closed however the reading ends: the engine stops then.

    A failure ends them with an error event, in OpenAI's form and without `[DONE]`.

    Args:
        first, parts: the first part, and the handle's response that gives the others.
        deadline: when the answer must be whole, by the event loop's clock.
        read: makes an event of a part, or nothing; what it raises as ApiError ends the answer.
        late: what a client is told behind the deadline.
    """

    def __init__(
        self, first: str, parts: Any, deadline: float, read: Callable[[Any], str], late: ApiError
    ) -> None:
        self._parts, self._read, self._late = parts, read, late
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._queue.put_nowait(first)
        self.ended: float | None = None  # when the answer was whole, by time.perf_counter()
        self._task = asyncio.create_task(self._take(deadline))

    async def __anext__(self) -> str:
        part = await self._queue.get()
        if part is None:
            self._queue.put_nowait(None)  # whoever asks again is told again
            raise StopAsyncIteration
        return part

    async def aclose(self) -> None:
        """Stop: nobody reads on. What is written by then is lost."""
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
            logger.error("an answer broke off: %s", type(error).__name__)
            failure = ApiError(503, "the answer broke off; ask again", code="engine_failed")
        except Exception as error:  # noqa: BLE001  a stream ends with an answer whatever happens
            logger.error("an answer broke off: %s", type(error).__name__)
            failure = ApiError(500, "the endpoint failed; try again")
        finally:
            self.ended = time.perf_counter()
            if not whole:
                self._parts.cancel()
            if failure is not None:
                self._queue.put_nowait(f"data: {json.dumps(failure.body())}\n\n")
            self._queue.put_nowait(None)
