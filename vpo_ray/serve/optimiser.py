"""A query's way through the endpoint: gate, policy, gate again, ranking; and what to do when it fails.

Behind both `/v1/optimize` and `/v1/chat/completions`, so that they agree on every outcome.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Literal

from ray.serve.handle import DeploymentHandle

from vpo_ray.flags import Flag, join
from vpo_ray.recipe import Serve
from vpo_ray.serve.answers import chunks_in
from vpo_ray.serve.errors import RequestError
from vpo_ray.serve.metrics import ServeMetrics
from vpo_ray.serve.optimize import GeneratorFlag, Latency, Optimization, Rank, Safety, Usage
from vpo_ray.serve.policy import Policy, PolicyFailed
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.safety import UNAVAILABLE, Gate, Verdict


def build_optimiser(
    main: DeploymentHandle, canary: DeploymentHandle | None, settings: Serve, control: tuple[str, ...]
) -> Optimiser:
    """The optimiser of a replica, with what the recipe names: gate, ranker, canary.

    Args:
        main, canary: handles of the `PolicyServer` deployments.
        control: the checkpoints' control tokens (policy_prompt.control_tokens).
    """
    policy = Policy(main, canary, settings, control, ServeMetrics())
    ranker = Ranker(settings.best_of) if settings.best_of else None
    return Optimiser(policy, Gate(settings.safety), ranker, settings)


class Optimiser:
    """Turns a query into an `Optimization`."""

    def __init__(self, policy: Policy, gate: Gate, ranker: Ranker | None, settings: Serve) -> None:
        self.policy, self.gate, self.ranker, self.settings = policy, gate, ranker, settings

    @property
    def looks_at_prompts(self) -> bool:
        """Whether a prompt must be whole before any of it may be sent."""
        return self.gate.settings.prompt or self.ranker is not None

    async def __call__(
        self, query: str, fields: Mapping[str, Any], request_id: str, flags: Sequence[GeneratorFlag] = ()
    ) -> Optimization:
        """Optimise one query. What is refused by the gate is an answer, not an error.

        Args:
            flags: generator flags that stood in the query. The policy does not see them, the gate does.

        Raises:
            RequestError: the engine refuses the query (400), or is overloaded.
            PolicyFailed: no answer, and the recipe has no fallback.
        """
        result = Optimization(model=self.settings.model_name, flags=list(flags))
        clock = _Clock()
        with clock.part("gate"):
            flagged = await self.check_query(query, result)
        if result.safety.outcome != "refused":
            try:
                with clock.part("optimiser"):
                    completion = await self.policy.answer(query, self._asked(fields), request_id)
            except PolicyFailed:
                if not self.settings.fallback:
                    raise
                await self.fall_back(query, flagged, result, clock)
            else:
                await self._choose(query, completion, fields["n"], flagged, result, clock)
        result.changed = result.prompt is not None and result.prompt != query
        result.latency = clock.latency()
        return result

    async def written(
        self, query: str, fields: Mapping[str, Any], request_id: str, result: Optimization
    ) -> AsyncGenerator[str, None]:
        """The prompt as the policy writes it; `result` is filled when it ends. For a gate that does
        not look at prompts, and one candidate. Raises what `__call__` raises."""
        clock = _Clock()
        with clock.part("gate"):
            flagged = await self.check_query(query, result)
        text = ""
        if result.safety.outcome != "refused":
            try:
                began = time.perf_counter()
                asked = {**fields, "stream_options": {"include_usage": True}}
                async with aclosing(await self.policy.stream(query, asked, request_id)) as parts:
                    async for part in parts:
                        for chunk in chunks_in(part):
                            _take(chunk, result)
                            for choice in chunk["choices"]:
                                if delta := choice["delta"].get("content"):
                                    text += delta
                                    yield delta
                    clock.written(began, parts.ended)
                result.prompt = text.strip()
            except PolicyFailed:
                if not self.settings.fallback:
                    raise
            if not result.prompt and self.settings.fallback:
                await self.fall_back(query, flagged, result, clock)
        result.changed = result.prompt is not None and result.prompt != query
        result.latency = clock.latency()

    async def check_query(self, query: str, result: Optimization) -> Verdict:
        """The gate in front of the policy; sets `result.safety`."""
        if not self.gate.checks_query:
            return Verdict()
        result.safety.checked.append("query")
        verdict = await self.gate.check(_whole(query, result))
        if verdict.flagged and (verdict.unavailable or self.gate.settings.query == "refuse"):
            _refuse(result, "query", verdict)
        return verdict

    async def fall_back(
        self, query: str, flagged: Verdict, result: Optimization, clock: _Clock | None = None
    ) -> None:
        """Answer with the raw query, unless the gate would not let it leave."""
        verdict = flagged
        if self.gate.settings.prompt and not flagged.flagged:
            with (clock or _Clock()).part("gate"):
                verdict = await self.gate.check(_whole(query, result))
        if verdict.flagged:
            _refuse(result, "query", verdict)
            return
        result.prompt, result.fallback = query, True

    async def _choose(
        self,
        query: str,
        completion: Mapping[str, Any],
        n: int,
        flagged: Verdict,
        result: Optimization,
        clock: _Clock,
    ) -> None:
        _take(completion, result)
        texts = [(c["message"].get("content") or "").strip() for c in completion["choices"]]
        prompts = [text for text in dict.fromkeys(texts) if text]
        if not prompts:
            if self.settings.fallback:
                await self.fall_back(query, flagged, result, clock)
            else:
                result.prompt = ""
            return
        if self.gate.settings.prompt:
            result.safety.checked.append("prompt")
            with clock.part("gate"):
                verdicts = await self.gate.check_all(prompts)
            bad = next((verdict for verdict in verdicts if verdict.flagged), None)
            prompts = [prompt for prompt, v in zip(prompts, verdicts, strict=True) if not v.flagged]
            if not prompts and bad is not None:
                return _refuse(result, "prompt", bad)
        if self.ranker is not None:
            with clock.part("ranking"):
                result.ranking = await self.ranker.rank(query, prompts)
            prompts = _ranked(prompts, result.ranking)
        if flagged.flagged:
            result.safety.outcome, result.safety.reason = "rewritten", f"query: {flagged.reason}"
        result.prompt, *rest = prompts
        result.alternatives = rest[: n - 1]

    def candidates(self, fields: Mapping[str, Any]) -> int:
        """How many prompts the policy writes for one query."""
        return int(self._asked(fields)["n"])

    def _asked(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        best_of = self.settings.best_of
        if fields["temperature"] == 0:
            return {**fields, "n": 1}  # greedy candidates are all the same one
        return {**fields, "n": max(fields["n"], best_of.n) if best_of else fields["n"]}


class _Clock:
    """Seconds of a query, by what they went to."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: Literal["gate", "optimiser", "ranking"]) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0) + time.perf_counter() - began

    def written(self, began: float, ended: float | None) -> None:
        """Count an answer that was streamed, without what its reader took beyond its end."""
        now = time.perf_counter()
        ended = now if ended is None else ended
        self._parts["optimiser"] = self._parts.get("optimiser", 0) + ended - began
        self._began += now - ended

    def latency(self) -> Latency:
        seconds = {**self._parts, "total": time.perf_counter() - self._began}
        return Latency(**{name: round(value, 4) for name, value in seconds.items()})


def refusal(safety: Safety) -> RequestError:
    """A refused query as an error, for clients of the chat API."""
    if safety.reason is not None and safety.reason.endswith(UNAVAILABLE):
        return RequestError(503, f"{safety.reason}; try again", code="safety_unavailable", headers=LATER)
    return RequestError(400, f"refused by the safety gate: {safety.reason}", "messages", "content_filter")


LATER = {"Retry-After": "2"}


def _take(reply: Mapping[str, Any], result: Optimization) -> None:
    """What a completion, or a chunk of one, says of itself. Raises PolicyFailed for an error."""
    if "error" in reply:
        raise PolicyFailed(reply["error"]["message"], timeout=reply["error"].get("code") == "timeout")
    if usage := reply.get("usage"):
        result.usage = Usage(**{name: usage.get(name, 0) for name in Usage.model_fields})
    result.system_fingerprint = reply.get("system_fingerprint") or result.system_fingerprint


def _whole(query: str, result: Optimization) -> str:
    """The query with its generator flags: what they say reaches the video model too."""
    return join(query, [Flag(flag.name, flag.value) for flag in result.flags])


def _refuse(result: Optimization, where: str, verdict: Verdict) -> None:
    result.safety.outcome, result.safety.reason = "refused", f"{where}: {verdict.reason}"
    result.prompt, result.alternatives = None, []


def _ranked(prompts: list[str], ranking: list[Rank] | None) -> list[str]:
    return prompts if ranking is None else [rank.prompt for rank in ranking]
