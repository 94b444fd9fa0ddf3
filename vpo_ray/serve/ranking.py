"""Best of n: rank the candidates of one query by a judge or a text reward."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe.serve import BestOf
from vpo_ray.serve.optimize_schema import Rank
from vpo_ray.serve.services import ServiceClient, ServiceError

logger = logging.getLogger("ray.serve")

MAX_SCORE = 10
CRITIQUE_CHARS = 600
SCHEMA = {
    "critique": {"type": "string", "maxLength": CRITIQUE_CHARS},
    "score": {"type": "number", "minimum": 0, "maximum": MAX_SCORE},
}


class Ranker:
    """Scores every candidate and sorts them, best first; equal scores keep the policy's order.

    Raises:
        ServiceError, PromptError: the settings cannot be used.
    """

    def __init__(self, settings: BestOf) -> None:
        self.settings = settings
        self.prompt = read_prompt(settings.judge_prompt)
        service, kind = (settings.judge, "judge") if settings.judge else (settings.rerank, "rerank")
        assert service is not None
        self.client = ServiceClient(service, f"best_of.{kind}")

    async def rank(self, query: str, prompts: Sequence[str]) -> list[Rank] | None:
        """The candidates, best first; None when the ranker fails, and they stay unranked."""
        try:
            ranks = await (
                self._judged(query, prompts) if self.settings.judge else self._reranked(query, prompts)
            )
        except ServiceError as error:
            logger.error("the candidates stay unranked: %s", error)
            return None
        return sorted(ranks, key=lambda rank: -rank.score)

    async def _judged(self, query: str, prompts: Sequence[str]) -> list[Rank]:
        return list(await asyncio.gather(*(self._judge(query, prompt) for prompt in prompts)))

    async def _judge(self, query: str, prompt: str) -> Rank:
        answer = await self.client.chat(fill(self.prompt, query=query, prompt=prompt), SCHEMA, "score")
        return Rank(
            prompt=prompt, score=answer["score"], reason=str(answer.get("critique", ""))[:CRITIQUE_CHARS]
        )

    async def _reranked(self, query: str, prompts: Sequence[str]) -> list[Rank]:
        reply = await self.client.ask("/rerank", {"query": query, "documents": list(prompts)})
        try:
            scores = {int(r["index"]): float(r["relevance_score"]) for r in reply["results"]}
            ranks = [Rank(prompt=prompt, score=scores[index]) for index, prompt in enumerate(prompts)]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServiceError(f"best_of.rerank: {type(error).__name__}") from error
        if not all(math.isfinite(rank.score) for rank in ranks):
            raise ServiceError("best_of.rerank: a score is not a number")
        return ranks
