"""The safety gate: which queries reach the policy, and which prompts leave the endpoint.

Checkers are a keyword list, an endpoint with OpenAI's `/v1/moderations`, and a chat endpoint that is asked
for a verdict. When one does not answer, `safety.on_error` decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vpo_ray.keywords import KeywordFileError, KeywordList
from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe.serve import Safety, Service
from vpo_ray.serve.images import GivenImage
from vpo_ray.serve.services import Declined, ServiceClient, ServiceError

logger = logging.getLogger("ray.serve")

REASON_CHARS = 300
SCHEMA = {"reason": {"type": "string", "maxLength": REASON_CHARS}, "unsafe": {"type": "boolean"}}
UNAVAILABLE = "the safety check did not answer"


class SafetyFileError(ValueError):
    """A keyword list that cannot be used."""


@dataclass(frozen=True)
class SafetyVerdict:
    """Why a text is flagged, or None; `unavailable` when a checker did not answer."""

    reason: str | None = None
    unavailable: bool = False

    @property
    def flagged(self) -> bool:
        return self.reason is not None


CLEAR = SafetyVerdict()


class Checker(Protocol):
    async def check(self, text: str, image: GivenImage | None = None) -> str | None:
        """Why the text is unsafe with the query's image, or None. Raises ServiceError when the checker
        fails."""
        ...


class Keywords:
    """Words and phrases of a file; see `vpo_ray.keywords`.

    Raises:
        SafetyFileError: no such file, or no word in it.
    """

    def __init__(self, path: str) -> None:
        try:
            self.words = KeywordList.read(path)
        except KeywordFileError as error:
            raise SafetyFileError(f"safety.keywords: {error}") from error

    async def check(self, text: str, image: GivenImage | None = None) -> str | None:
        found = self.words.find(text)
        return None if found is None else f"keyword {found!r}"


class Moderation:
    """A classifier behind OpenAI's `/v1/moderations`. Mistral's gives categories only, without `flagged`."""

    def __init__(self, service: Service) -> None:
        self.client = ServiceClient(service, "safety.moderation")

    async def check(self, text: str, image: GivenImage | None = None) -> str | None:
        shown = self.client.shown(image)
        asked = [*shown, {"type": "text", "text": text}] if shown else text
        reply = await self.client.ask("/moderations", {"input": asked})
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise ServiceError("safety.moderation: no results")
        found = [_flagged(result) for result in results]
        if not any(flagged for flagged, _ in found):
            return None
        on = sorted({name for _, names in found for name in names})
        return f"classified as {', '.join(on)[:REASON_CHARS] or 'unsafe'}"


def _flagged(result: Any) -> tuple[bool, list[str]]:
    """Whether a moderation result flags the text, and the categories that apply."""
    categories = result.get("categories") if isinstance(result, dict) else None
    known = categories if isinstance(categories, dict) else {}
    on = [str(name) for name, value in known.items() if value is True]
    flagged = result.get("flagged") if isinstance(result, dict) else None
    if isinstance(flagged, bool):
        return flagged, on
    if flagged is not None or not known or not all(isinstance(value, bool) for value in known.values()):
        raise ServiceError("safety.moderation: a result that does not say whether the text is flagged")
    return bool(on), on


class SafetyJudge:
    """An LLM that gives a verdict, held to a JSON schema."""

    def __init__(self, service: Service, prompt: str) -> None:
        self.client = ServiceClient(service, "safety.judge")
        self.prompt = read_prompt(prompt)

    async def check(self, text: str, image: GivenImage | None = None) -> str | None:
        answer = await self.client.chat(fill(self.prompt, text=text), SCHEMA, "unsafe", image)
        if not answer["unsafe"]:
            return None
        return f"judged unsafe: {str(answer.get('reason') or 'no reason given')[:REASON_CHARS]}"


class Gate:
    """The checkers of a recipe, asked in order.

    Raises:
        SafetyFileError, PromptError, ServiceError: the settings cannot be used.
    """

    def __init__(self, settings: Safety) -> None:
        self.settings = settings
        self.checkers: list[Checker] = []
        if settings.keywords:
            self.checkers.append(Keywords(settings.keywords))
        if settings.moderation:
            self.checkers.append(Moderation(settings.moderation))
        if settings.judge:
            self.checkers.append(SafetyJudge(settings.judge, settings.judge_prompt))

    @property
    def checks_query(self) -> bool:
        return self.settings.query != "off"

    async def check(self, text: str, image: GivenImage | None = None) -> SafetyVerdict:
        """The verdict of the checkers; one that fails counts as `safety.on_error` says.

        Args:
            image: of the query; shown to the checkers that see.
        """
        failed = False
        for checker in self.checkers:
            try:
                reason = await checker.check(text, image)
            except Declined as error:
                # The service's own filter refused the text, which is a verdict.
                return SafetyVerdict(str(error))
            except ServiceError as error:
                logger.error("%s; it counts as %s", error, self.settings.on_error)
                failed = True
                continue
            if reason is not None:
                return SafetyVerdict(reason)
        if failed and self.settings.on_error == "refuse":
            return SafetyVerdict(UNAVAILABLE, unavailable=True)
        return CLEAR

    async def check_all(self, texts: Sequence[str], image: GivenImage | None = None) -> list[SafetyVerdict]:
        return await asyncio.gather(*(self.check(text, image) for text in texts))
