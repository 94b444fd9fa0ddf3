"""What endpoints were paid, and the limit that stops a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vpo_ray.engines.chat import Usage


class CostLimitReached(RuntimeError):
    """`limits.max_cost` is spent; the run goes on when it is raised."""

    stops_run = True  # see stream/stops.py


@dataclass
class Account:
    """What the run has paid to endpoints.

    Every `EndpointClient` has one, and pays every answer that it gets into it, readable or not, before
    anything else is made of the answer. By default it is its own and has no limit.

    Args:
        add: adds a cost, and returns all that the run has paid, whoever paid it.
        limit: `limits.max_cost`.
    """

    add: Callable[[float], Awaitable[float]] | None = None
    limit: float | None = None
    spent: float = 0.0

    async def pay(self, cost: float) -> None:
        self.spent = self.spent + cost if self.add is None else await self.add(cost)

    async def charge(self, usage: Usage) -> None:
        """Pay for an answer."""
        await self.pay(usage.cost)

    async def found(self, cost: float) -> None:
        """An answer that this run paid for before is used: this account was not there then."""
        await self.pay(cost)

    def check(self, coming: float = 0.0) -> None:
        """Raises CostLimitReached. The answers under way when the limit is reached go beyond it.

        Args:
            coming: what is known to be paid soon.
        """
        if self.limit is not None and self.spent + coming >= self.limit:
            raise CostLimitReached(
                f"limits.max_cost {self.limit:g} is reached: the endpoints' answers cost {self.spent:.4f} so "
                "far. Raise it to go on"
            )
