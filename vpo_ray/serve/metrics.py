"""The endpoint's Prometheus metrics (`vpo_ray.metrics.SERVING`).

They count callers and outcomes. Serve's own metrics cover replicas, queues
(`serve_deployment_queued_queries`) and latency by deployment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import metrics as serve_metrics

from vpo_ray.metrics import SERVING
from vpo_ray.serve.optimize_schema import Optimization


class ServeMetrics:
    """Metrics of one ingress replica; created in the replica, so that they have its tags."""

    def __init__(self) -> None:
        made = {name: metric.make(serve_metrics) for name, metric in SERVING.items()}
        self._requests, self._seconds, self._tokens = made["requests"], made["seconds"], made["tokens"]
        self._running, self._fallbacks, self._gate = made["running"], made["fallbacks"], made["gate"]
        self._retries, self._variants = made["retries"], made["variants"]

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
