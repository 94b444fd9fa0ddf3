"""The endpoint backend of the chat engine: any OpenAI-compatible server, each answer paid once.

An answer is stored under the content of its request at once, so that a killed run pays for nothing twice.
Costs are added up over the whole run, and `limits.max_cost` stops it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from vpo_ray.engines.chat import Answer, ChatError, Message, Refusal, Sampling
from vpo_ray.engines.endpoint.account import Account, CostLimitReached
from vpo_ray.engines.endpoint.client import IMAGE_TOKENS, EndpointClient, RequestError
from vpo_ray.engines.endpoint.completion import Completion
from vpo_ray.engines.endpoint.failures import about
from vpo_ray.files.folder import Folder
from vpo_ray.prompts.answers import find_object, schema_fault
from vpo_ray.prompts.material import fill
from vpo_ray.recipe import ChatModel
from vpo_ray.records import content_id

logger = logging.getLogger(__name__)

_REPAIR = (
    "That is not the JSON object that was asked for: {fault}. "
    "Answer again with the JSON object alone, without any text or code fence around it."
)


class Answers:
    """Stored answers, a file each, under the content of their request, in a folder that runs may share.

    Args:
        run: the run that pays. Answers that another run paid for are free.
    """

    def __init__(self, uri: str, run: str) -> None:
        self.folder, self.run = Folder(uri), content_id("run", run, digits=16)

    def find(self, key: str) -> Answer | None:
        """A stored answer, or None. A damaged file counts as none. Raises StorageError."""
        try:
            kept = json.loads(self.folder.read(self._name(key)))
            answer, mine = Answer(**kept["answer"]), kept["run"] == self.run
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning("%s/%s is damaged, the request is sent again", self.folder.uri, self._name(key))
            return None
        return answer if mine else replace(answer, cost=0.0)

    def keep(self, key: str, answer: Answer) -> None:
        """Store an answer. Raises StorageError."""
        kept = {"answer": asdict(answer), "run": self.run}
        self.folder.write(self._name(key), json.dumps(kept, ensure_ascii=False).encode())

    def _name(self, key: str) -> str:
        return f"{key[:2]}/{key}.json"


class OpenAIChat:
    """Chat on an endpoint; see `chat.Chat`."""

    def __init__(self, model: ChatModel, client: EndpointClient, answers: Answers, account: Account) -> None:
        self.model, self.client, self.answers, self.account = model, client, answers, account
        client.account = account
        self._under_way, self._idle = 0, asyncio.Event()
        # As many threads as requests, so that a slow disk or store delays no request.
        self._files = ThreadPoolExecutor(model.endpoint.concurrency, "answers")

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        """One answer, stored or new.

        Raises:
            Refusal: the model declined, or a content filter stopped it.
            ChatError: no answer, one that was cut off, or not of the schema even after a repair round.
            EndpointError: the endpoint cannot be used at all.
            CostLimitReached: the limit is reached. This client's running requests are stored by then.
            StorageError: stored answers cannot be read or written.
        """
        endpoint = self.model.endpoint
        asked = [self.model.model, list(messages), asdict(sampling), schema]
        where: list[Any] = [
            endpoint.base_url,
            endpoint.azure_api_version,
            endpoint.structured,
            endpoint.request,
        ]
        if self.model.chat_template_kwargs:
            where.append({"chat_template_kwargs": self.model.chat_template_kwargs})
        key = content_id("answer", *asked, *where)
        files = partial(asyncio.get_running_loop().run_in_executor, self._files)
        kept = await files(self.answers.find, key)
        if kept is not None:
            await self.account.found(kept.cost)
            return kept
        try:
            with self._asking():
                answer = await self._ask(messages, sampling, schema)
                if schema is not None:
                    answer = await self._of_schema(answer, messages, sampling, schema)
                await files(self.answers.keep, key, answer)
        except CostLimitReached:
            # The run stops, and this process with it: store first what is paid for.
            while self._under_way:
                self._idle.clear()
                await self._idle.wait()
            raise
        return answer

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _of_schema(
        self, first: Answer, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any]
    ) -> Answer:
        """The answer reduced to its JSON object, after a repair round if it has none."""
        text = find_object(first.text, schema)
        fault = schema_fault(text, schema)
        if fault is None:
            return replace(first, text=text)
        turns = [
            *messages,
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": fill(_REPAIR, fault=fault)},
        ]
        try:
            second = await self._ask(turns, sampling, schema)
        except ChatError as error:
            error.usage += first.usage
            raise
        usage = first.usage + second.usage
        text = find_object(second.text, schema)
        if (fault := schema_fault(text, schema)) is not None:
            raise ChatError(
                f"the answer is not the requested JSON, even after a repair round: {fault}: "
                f"{second.text[:200]!r}",
                usage,
            )
        return Answer(text, second.finish_reason, usage.prompt, usage.completion, usage.cost)

    async def _ask(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None
    ) -> Answer:
        request: dict[str, Any] = {
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
        }
        if self.model.chat_template_kwargs:
            request["chat_template_kwargs"] = self.model.chat_template_kwargs
        # An estimate for the budget, corrected when the answer arrives.
        tokens = sum(_tokens(message["content"]) for message in messages) + sampling.max_tokens
        try:
            reply = await self.client.create(request, tokens, schema)
        except RequestError as error:
            raise (Refusal if error.filtered else ChatError)(str(error)) from None
        return self._read(reply, sampling)

    def _read(self, reply: Completion, sampling: Sampling) -> Answer:
        usage = reply.usage
        if reply.refusal:
            raise Refusal(reply.refusal, usage)
        if reply.cut:
            raise ChatError(f"the answer was cut off at max_tokens {sampling.max_tokens}: raise it", usage)
        if reply.finish == "error" or (reply.error and not reply.text):
            filtered = about(400, reply.error, str(reply.error)) == "input"
            raise (Refusal if filtered else ChatError)(
                f"the answer was interrupted: {str(reply.error)[:300]}", usage
            )
        if not reply.text:
            raise ChatError(f"the answer has no text (finish_reason {reply.finish})", usage)
        return Answer(reply.text, reply.finish, usage.prompt, usage.completion, usage.cost)


def _tokens(content: str | list[dict[str, Any]]) -> int:
    """Of a message, about: four bytes a token, and IMAGE_TOKENS an image."""
    if isinstance(content, str):
        return len(content.encode()) // 4
    return sum(IMAGE_TOKENS if "image_url" in part else _tokens(part["text"]) for part in content)
