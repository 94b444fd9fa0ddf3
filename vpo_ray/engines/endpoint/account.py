"""The cost of endpoints' answers, and the limit that stops a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vpo_ray.engines.chat import Usage


class CostLimitReached(RuntimeError):
    """`limits.max_cost` is spent; the run can continue when it is raised."""

    stops_run = True  # see stream/stops.py


@dataclass
class Account:
    """The run's costs of endpoints, in the currency of their prices.

    Every `EndpointClient` has one, and charges every answer to it, readable or not, before using the answer.
    By default each client has its own, without a limit.

    Args:
        add: adds a cost, and returns the total of the run over all its processes.
        limit: `limits.max_cost`.
        answers: URI of the folder in which what was paid for and is of no use yet is kept for a later try.
    """

    add: Callable[[float], Awaitable[float]] | None = None
    limit: float | None = None
    spent: float = 0.0
    answers: str | None = None

    async def pay(self, cost: float) -> None:
        self.spent = self.spent + cost if self.add is None else await self.add(cost)

    async def charge(self, usage: Usage) -> None:
        """Pay for an answer."""
        await self.pay(usage.cost)

    async def found(self, cost: float) -> None:
        """Count a stored answer that this run paid for before this account existed."""
        await self.pay(cost)

    def check(self, coming: float = 0.0) -> None:
        """Raises CostLimitReached. Requests already sent when the limit is reached may exceed it.

        Args:
            coming: costs that are known to follow soon.
        """
        if self.limit is not None and self.spent + coming >= self.limit:
            raise CostLimitReached(
                f"limits.max_cost {self.limit:g} is reached: the endpoints' answers cost {self.spent:.4f} so "
                "far. Raise it to go on"
            )
