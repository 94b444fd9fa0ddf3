"""The Prometheus metrics of the product, which Ray exports on every node with `ray_` before their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # upper bounds of a histogram's buckets


@dataclass(frozen=True)
class Metric:
    """A metric by what it is called and counts.

    Args:
        kind: `Counter`, `Gauge` or `Histogram`.
        tags: the labels of its series.
    """

    name: str
    kind: str
    text: str
    tags: tuple[str, ...] = ()

    def make(self, module: Any) -> Any:
        """The metric, of `ray.util.metrics` or, in a replica of Serve, of `ray.serve.metrics`."""
        more = {"boundaries": list(SECONDS)} if self.kind == "Histogram" else {}
        return getattr(module, self.kind)(self.name, self.text, tag_keys=self.tags, **more)


STAGES = {
    "rows": Metric("vpo_rows", "Counter", "Rows that left a stage", ("stage", "outcome")),
    "seconds": Metric("vpo_replica_seconds", "Counter", "Busy seconds of a stage's replicas", ("stage",)),
    "warm_up": Metric(
        "vpo_warm_up_seconds", "Counter", "Seconds in which replicas loaded and compiled", ("stage",)
    ),
    "tokens": Metric("vpo_tokens", "Counter", "Tokens of the LLMs", ("stage", "kind")),
    "cost": Metric("vpo_cost", "Counter", "Paid to endpoints, in their prices' currency", ("stage",)),
    "score": Metric("vpo_score", "Gauge", "The last score of a replica"),
}
SERVING = {
    "requests": Metric("vpo_serve_requests", "Counter", "Requests answered", ("endpoint", "outcome", "key")),
    "seconds": Metric("vpo_serve_seconds", "Histogram", "Seconds of an answer", ("endpoint",)),
    "tokens": Metric("vpo_serve_tokens", "Counter", "Tokens of the policy", ("kind", "key")),
    "running": Metric("vpo_serve_running", "Gauge", "Requests admitted and not answered yet"),
    "fallbacks": Metric("vpo_serve_fallbacks", "Counter", "Answers that are the raw query"),
    "gate": Metric("vpo_serve_gate", "Counter", "Outcomes of the safety gate", ("outcome",)),
    "retries": Metric("vpo_serve_retries", "Counter", "Calls of the engine that were tried again"),
    "variants": Metric("vpo_serve_variants", "Counter", "Queries by checkpoint", ("variant",)),
}
