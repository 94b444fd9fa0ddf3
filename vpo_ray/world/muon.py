"""The optimiser of the world's small models: Muon for matrices, Adam for the rest, an average of the weights.

Muon (Jordan et al., 2024) makes a matrix's momentum orthogonal before it is added. Per step it learns
much more than Adam on models of a few million parameters, and costs next to nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Budget:
    """How long a training lasts: so many steps, and no more than so many seconds.

    Args:
        warm_up: steps in which the rate rises; afterwards it falls as a cosine to zero.
    """

    steps: int
    seconds: float = math.inf
    warm_up: int = 30
    step: int = 0
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def rates(self) -> Iterator[float]:
        """The share of the highest rate for each step."""
        self._start = time.monotonic()
        for step in range(self.steps):
            self.step = step
            if (done := max(step / self.steps, self.elapsed / self.seconds)) >= 1:
                return
            yield min(1.0, (step + 1) / self.warm_up) * (1 + math.cos(math.pi * done)) / 2


class Muon:
    """Trains the parameters of modules, which may be in bfloat16: what is updated is a copy in float32.

    Args:
        modules: what is trained.
        rate: of a matrix's elements, as in AdamW (the update's root mean square is 0.2 of it).
        adam_rate: of vectors, embeddings and whatever `adam` names.
        adam: parts of names of matrices that Adam trains: those next to pixels.
        average: decay of the exponential average of the weights.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        rate: float,
        adam_rate: float,
        adam: tuple[str, ...] = (),
        average: float = 0.998,
    ) -> None:
        self.rate, self.adam_rate, self.average = rate, adam_rate, average
        self.step_count = 0
        self._states: list[dict[str, Any]] = []
        for module in modules:
            embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
            for name, p in module.named_parameters():
                by_adam = p.ndim < 2 or id(p) in embedded or any(part in name for part in adam)
                master = p.detach().float().clone()
                self._states.append(
                    {
                        "parameter": p,
                        "master": master,
                        "average": master.clone(),
                        "first": torch.zeros_like(master),
                        "second": torch.zeros_like(master) if by_adam else None,
                    }
                )

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Update by the gradients, which are dropped.

        Args:
            share: of the rates, from 0 to 1.
        """
        self.step_count += 1
        decay = min(self.average, (1 + self.step_count) / (10 + self.step_count))
        for state in self._states:
            p, master, first = state["parameter"], state["master"], state["first"]
            if p.grad is None:
                continue
            gradient, p.grad = p.grad.float(), None
            if (second := state["second"]) is None:
                first.lerp_(gradient, 0.05)
                update = _orthogonal(gradient.lerp(first, 0.95).flatten(1)).view_as(first)
                wide = max(first.shape[0], first[0].numel())
                master.add_(update, alpha=-share * self.rate * 0.2 * wide**0.5)
            else:
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.02)
                unbiased = first / (1 - 0.9**self.step_count)
                spread = (second / (1 - 0.98**self.step_count)).sqrt_().add_(1e-8)
                master.addcdiv_(unbiased, spread, value=-share * self.adam_rate)
            p.copy_(master)
            state["average"].lerp_(master, 1 - decay)

    def end(self) -> None:
        """Leave the averages in the modules."""
        self._load("average")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the parameters are their averages."""
        self._load("average")
        try:
            yield
        finally:
            self._load("master")

    @torch.no_grad()
    def _load(self, which: str) -> None:
        for state in self._states:
            state["parameter"].copy_(state[which])


def _orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz iterations with the coefficients of Muon's authors: singular values of about one."""
    x = matrix.bfloat16()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()
