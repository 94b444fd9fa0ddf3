"""The endpoint's Prometheus metrics, which Ray exports on every node.

They count callers and outcomes. Serve's own metrics cover replicas, queues
(`serve_deployment_queued_queries`) and latency by deployment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from vpo_ray.serve.optimize_schema import Optimization

SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


class ServeMetrics:
    """Metrics of one ingress replica; created in the replica, so that they have its tags."""

    def __init__(self) -> None:
        by_caller = ("endpoint", "outcome", "key")
        self._requests = Counter("vpo_serve_requests", "Requests answered", tag_keys=by_caller)
        self._seconds = Histogram(
            "vpo_serve_seconds", "Seconds of an answer", boundaries=SECONDS, tag_keys=("endpoint",)
        )
        self._tokens = Counter("vpo_serve_tokens", "Tokens of the policy", tag_keys=("kind", "key"))
        self._running = Gauge("vpo_serve_running", "Requests admitted and not answered yet")
        self._fallbacks = Counter("vpo_serve_fallbacks", "Answers that are the raw query")
        self._gate = Counter("vpo_serve_gate", "Outcomes of the safety gate", tag_keys=("outcome",))
        self._retries = Counter("vpo_serve_retries", "Calls of the engine that were tried again")
        self._variants = Counter("vpo_serve_variants", "Queries by checkpoint", tag_keys=("variant",))

    def answered(self, endpoint: str, outcome: str, key: str, seconds: float) -> None:
        self._requests.inc(1, {"endpoint": endpoint, "outcome": outcome, "key": key})
        self._seconds.observe(seconds, {"endpoint": endpoint})

    def running(self, count: int) -> None:
        self._running.set(count)

    def retried(self) -> None:
        self._retries.inc()

    def variant(self, name: str) -> None:
        self._variants.inc(1, {"variant": name})

    def tokens(self, usage: Mapping[str, Any], key: str) -> None:
        for kind in ("prompt", "completion"):
            if count := usage.get(f"{kind}_tokens"):
                self._tokens.inc(count, {"kind": kind, "key": key})

    def optimised(self, result: Optimization, key: str) -> None:
        self.tokens(result.usage.model_dump(), key)
        if result.safety.checked:
            self._gate.inc(1, {"outcome": result.safety.outcome})
        if result.fallback:
            self._fallbacks.inc()
