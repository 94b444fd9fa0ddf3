"""Best of n: rank the candidates of one query by a judge or a text reward."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

from vpo_ray.prompts.material import fill
from vpo_ray.prompts.policy_prompt import read_prompt
from vpo_ray.recipe import Formula
from vpo_ray.recipe.serve import BestOf
from vpo_ray.serve.images import GivenImage
from vpo_ray.serve.optimize_schema import Rank
from vpo_ray.serve.services import ServiceClient, ServiceError
from vpo_ray.stages.formula import weigh

logger = logging.getLogger("ray.serve")

MAX_SCORE = 10
CRITIQUE_CHARS = 600
SCHEMA = {
    "critique": {"type": "string", "maxLength": CRITIQUE_CHARS},
    "score": {"type": "number", "minimum": 0, "maximum": MAX_SCORE},
}


def by_formula(found: Mapping[str, Sequence[Rank]], formula: Formula) -> list[Rank]:
    """The candidates by a formula's total, best first, then those that a threshold refuses, then those that a
    gate leaves out, whose score is 0.

    Args:
        found: what each service says of the same candidates, in one order.
    """
    candidates = list(zip(*found.values(), strict=True))
    values = [{name: rank.score for name, rank in zip(found, ranks, strict=True)} for ranks in candidates]
    weighed = weigh(values, formula)
    placed = []
    for ranks, total, out, refused in zip(
        candidates, weighed.totals.tolist(), weighed.out, weighed.refused, strict=True
    ):
        said = next((rank.reason for rank in ranks if rank.reason), None)
        score = total if out is None else 0.0
        rank = Rank(prompt=ranks[0].prompt, score=score, reason=out or refused or said)
        placed.append((out is not None, refused is not None, -score, rank))
    return [rank for *_, rank in sorted(placed, key=lambda place: place[:3])]


class Ranker:
    """Scores every candidate and sorts them, best first; equal scores keep the policy's order.

    With a formula the score is its total, over the judge's and the reranker's scores of the candidates. One
    that a gate leaves out comes last, before it one that a threshold refuses; their reasons say so.

    Raises:
        ServiceError, PromptError: the settings cannot be used.
    """

    def __init__(self, settings: BestOf) -> None:
        self.settings = settings
        self.prompt = read_prompt(settings.judge_prompt)
        services = {"judge": settings.judge, "rerank": settings.rerank}
        self.clients = {
            name: ServiceClient(service, f"best_of.{name}")
            for name, service in services.items()
            if service is not None
        }

    async def rank(
        self, query: str, prompts: Sequence[str], image: GivenImage | None = None
    ) -> list[Rank] | None:
        """The candidates, best first; None when the ranker fails, and they stay unranked.

        Args:
            image: of the query. The judge is shown it; a reranker reads text alone.
        """
        asked = {}
        if "judge" in self.clients:
            asked["judge"] = self._judge_all(query, prompts, image)
        if "rerank" in self.clients:
            asked["rerank"] = self._rerank_all(query, prompts)
        try:
            found = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        except ServiceError as error:
            logger.error("the candidates stay unranked: %s", error)
            return None
        if self.settings.formula is not None:
            return by_formula(found, self.settings.formula)
        [ranks] = found.values()
        return sorted(ranks, key=lambda rank: -rank.score)

    async def _judge_all(self, query: str, prompts: Sequence[str], image: GivenImage | None) -> list[Rank]:
        return list(await asyncio.gather(*(self._judge(query, prompt, image) for prompt in prompts)))

    async def _judge(self, query: str, prompt: str, image: GivenImage | None) -> Rank:
        question = fill(self.prompt, query=query, prompt=prompt)
        answer = await self.clients["judge"].chat(question, SCHEMA, "score", image)
        return Rank(
            prompt=prompt, score=answer["score"], reason=str(answer.get("critique", ""))[:CRITIQUE_CHARS]
        )

    async def _rerank_all(self, query: str, prompts: Sequence[str]) -> list[Rank]:
        reply = await self.clients["rerank"].ask("/rerank", {"query": query, "documents": list(prompts)})
        try:
            scores = {int(r["index"]): float(r["relevance_score"]) for r in reply["results"]}
            ranks = [Rank(prompt=prompt, score=scores[index]) for index, prompt in enumerate(prompts)]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServiceError(f"best_of.rerank: {type(error).__name__}") from error
        if not all(math.isfinite(rank.score) for rank in ranks):
            raise ServiceError("best_of.rerank: a score is not a number")
        return ranks
