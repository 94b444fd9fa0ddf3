"""A query's way through the endpoint: gate, policy, gate again, ranking, and the fallback.

Both `/v1/optimize` and `/v1/chat/completions` use it, so that they agree on every outcome.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from ray.serve.handle import DeploymentHandle

from vpo_ray.flags import Flag, join_flags
from vpo_ray.prompts.answers import response_format
from vpo_ray.prompts.conditions import conditioned
from vpo_ray.recipe import Serve
from vpo_ray.serve.answers import chunks_in, delta_texts, is_cut, texts_of
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.images import GivenImage
from vpo_ray.serve.metrics import ServeMetrics
from vpo_ray.serve.optimize_schema import GeneratorFlag, Latency, Optimization, SafetyOutcome, TokenUsage
from vpo_ray.serve.policy import PolicyClient, PolicyFailed
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.safety import CLEAR, UNAVAILABLE, Gate, SafetyVerdict
from vpo_ray.serve.wishes import NO_WISHES, Effort, Wishes


def build_optimiser(
    main: DeploymentHandle, canary: DeploymentHandle | None, settings: Serve, control: tuple[str, ...]
) -> Optimiser:
    """The optimiser of a replica, with what the recipe names: gate, ranker, canary.

    Args:
        main, canary: handles of the `PolicyServer` deployments.
        control: the checkpoints' control tokens (policy_prompt.control_tokens).
    """
    policy = PolicyClient(main, canary, settings, control, ServeMetrics())
    ranker = Ranker(settings.best_of) if settings.best_of else None
    return Optimiser(policy, Gate(settings.safety), ranker, settings)


@dataclass(frozen=True)
class Checked:
    """A query that the gate has seen: its text, the generator flags that were in it, its image, the gate's
    verdict."""

    query: str
    flags: Sequence[GeneratorFlag]
    verdict: SafetyVerdict
    safety: SafetyOutcome
    image: GivenImage | None = None

    @property
    def refused(self) -> bool:
        return self.safety.outcome == "refused"


class Optimiser:
    """Turns a query into an `Optimization`."""

    def __init__(self, policy: PolicyClient, gate: Gate, ranker: Ranker | None, settings: Serve) -> None:
        self.policy, self.gate, self.ranker, self.settings = policy, gate, ranker, settings

    @property
    def needs_whole_prompts(self) -> bool:
        """Whether a prompt must be complete before any of it may be sent."""
        return self.gate.settings.prompt or self.ranker is not None

    def streams(self, n: int, wishes: Wishes) -> bool:
        """Whether a prompt of n may be sent as it is written."""
        ranked = self.ranker is not None and wishes.effort != "low"
        checked = self.gate.settings.prompt or replace(wishes, effort="medium") != NO_WISHES
        return n == 1 and not ranked and not checked

    async def __call__(
        self,
        query: str,
        fields: Mapping[str, Any],
        request_id: str,
        flags: Sequence[GeneratorFlag] = (),
        wishes: Wishes = NO_WISHES,
        image: GivenImage | None = None,
    ) -> Optimization:
        """Optimise one query. What the gate refuses is an answer, not an error.

        Args:
            flags: generator flags of the query. The policy does not see them, the gate does.
            wishes: of the request; where no prompt meets them, the policy is asked once more.
            image: of the query, for a policy that sees.

        Raises:
            ApiError: the engine refuses the query (400), or is overloaded.
            PolicyFailed: no answer, and the recipe has no fallback.
        """
        clock = _Clock()
        with clock.part("gate"):
            checked = await self.check_query(query, flags, image)
        if checked.refused:
            return _finished(self.result(checked), query, clock)
        if wishes.skips(query) and not checked.verdict.flagged:
            with clock.part("gate"):
                result = await self.fall_back(checked)
            if result.prompt is not None:  # else the policy is to make it harmless
                kept = {"fallback": False, "skipped": True}
                return _finished(_told_unmet(result.model_copy(update=kept), wishes), query, clock)
        asked = self._asked(fields, wishes.effort)
        told, schema = query, wishes.conditions.schema()
        if self.settings.tell_wishes:
            told = conditioned(query, wishes.conditions)
        if schema is not None:
            asked["response_format"] = response_format(schema)
        written, facts = await self._written(told, asked, request_id, clock, wishes, image)
        if wishes.of_prompts and written and all(map(wishes.unmet, written)):
            again = {**asked, "seed": _next_seed(fields["seed"])}
            more, spent = dict[str, bool](), dict[str, Any]()
            with suppress(ApiError, PolicyFailed):  # what there is, is the answer
                more, spent = await self._written(told, again, request_id, clock, wishes, image)
            written |= more
            facts |= {"usage": _sum(facts.get("usage"), spent.get("usage"))}
        whole = [text for text, cut in written.items() if not cut]
        if prompts := whole or list(written):
            facts["cut"] = not whole
            ranker = None if wishes.effort == "low" else self.ranker
            result = await self._choose(checked, prompts, wishes, fields["n"], ranker, clock)
        else:
            result = await self._without_prompt(checked, clock)
        return _finished(_told_unmet(result.model_copy(update=facts), wishes), query, clock)

    async def _written(
        self,
        message: str,
        asked: Mapping[str, Any],
        request_id: str,
        clock: _Clock,
        wishes: Wishes,
        image: GivenImage | None,
    ) -> tuple[dict[str, bool], dict[str, Any]]:
        """The policy's prompts, each once, with whether it is cut, and usage and fingerprint. No prompt where
        it fails and the recipe has a fallback."""
        reply: dict[str, Any] = {"choices": []}
        try:
            with clock.part("optimiser"):
                reply = await self.policy.answer(message, asked, request_id, image)
        except PolicyFailed:
            if not self.settings.fallback:
                raise
        prompts: dict[str, bool] = {}
        for choice, text in zip(reply["choices"], texts_of(reply), strict=True):
            if shaped := wishes.conditions.shaped(text):
                prompts[shaped] = is_cut(choice) and prompts.get(shaped, True)
        return prompts, _facts(reply)

    async def stream(
        self,
        query: str,
        fields: Mapping[str, Any],
        request_id: str,
        flags: Sequence[GeneratorFlag] = (),
        image: GivenImage | None = None,
    ) -> AsyncGenerator[str | Optimization, None]:
        """The prompt in pieces, as the policy writes it, then the whole result. For a gate that does not
        check prompts, and one candidate. Raises what `__call__` raises."""
        clock = _Clock()
        with clock.part("gate"):
            checked = await self.check_query(query, flags, image)
        if checked.refused:
            yield _finished(self.result(checked), query, clock)
            return
        text = ""
        facts: dict[str, Any] = {}
        try:
            began = time.perf_counter()
            asked = {**fields, "stream_options": {"include_usage": True}}
            async with aclosing(await self.policy.stream(query, asked, request_id, image)) as parts:
                async for part in parts:
                    for chunk in chunks_in(part):
                        facts |= _facts(chunk)
                        facts["cut"] = facts.get("cut", False) or any(map(is_cut, chunk.get("choices", [])))
                    for delta in delta_texts(part):
                        text += delta
                        yield delta
                clock.written(began, parts.ended)
            prompt = text.strip()
        except PolicyFailed:
            if not self.settings.fallback:
                raise
            prompt = ""
        if not prompt:
            facts.pop("cut", None)
        result = self.result(checked, prompt=prompt) if prompt else await self._without_prompt(checked, clock)
        yield _finished(result.model_copy(update=facts), query, clock)

    def result(self, checked: Checked, **values: Any) -> Optimization:
        """The answer to a checked query with these fields."""
        given = {"safety": checked.safety, "flags": list(checked.flags), **values}
        return Optimization(model=self.settings.model_name, **given)

    async def check_query(
        self, query: str, flags: Sequence[GeneratorFlag] = (), image: GivenImage | None = None
    ) -> Checked:
        """What the gate says of a query before the policy sees it."""
        if not self.gate.checks_query:
            return Checked(query, flags, CLEAR, SafetyOutcome(), image)
        verdict = await self.gate.check(_with_flags(query, flags), image)
        safety = SafetyOutcome(checked=["query"])
        if verdict.flagged and (verdict.unavailable or self.gate.settings.query == "refuse"):
            safety = _refused(safety, "query", verdict)
        return Checked(query, flags, verdict, safety, image)

    async def fall_back(self, checked: Checked) -> Optimization:
        """The raw query as the answer, unless the gate refuses to let it out."""
        verdict = checked.verdict
        if self.gate.settings.prompt and not verdict.flagged:
            verdict = await self.gate.check(_with_flags(checked.query, checked.flags), checked.image)
        if verdict.flagged:
            return self.result(checked, safety=_refused(checked.safety, "query", verdict))
        return self.result(checked, prompt=checked.query, fallback=True)

    async def as_it_is(
        self, query: str, flags: Sequence[GeneratorFlag] = (), image: GivenImage | None = None
    ) -> Optimization:
        """A text that is not to be optimised, as the answer, unless the gate refuses it."""
        checked = await self.check_query(query, flags, image)
        if checked.refused:
            return self.result(checked)
        return (await self.fall_back(checked)).model_copy(update={"fallback": False})

    async def _without_prompt(self, checked: Checked, clock: _Clock) -> Optimization:
        if not self.settings.fallback:
            return self.result(checked, prompt="")
        with clock.part("gate"):
            return await self.fall_back(checked)

    async def _choose(
        self,
        checked: Checked,
        prompts: list[str],
        wishes: Wishes,
        n: int,
        ranker: Ranker | None,
        clock: _Clock,
    ) -> Optimization:
        """The best of the prompts that leave the least unmet of those that the gate lets out, and up to n - 1
        alternatives."""
        safety = checked.safety
        if self.gate.settings.prompt:
            safety = safety.model_copy(update={"checked": [*safety.checked, "prompt"]})
            with clock.part("gate"):
                prompts, fault = await self._let_out(prompts, wishes, checked.image)
            if fault is not None:
                return self.result(checked, safety=_refused(safety, "prompt", fault))
        else:
            prompts = wishes.best(prompts)
        ranking = None
        if ranker is not None:
            with clock.part("ranking"):
                ranking = await ranker.rank(checked.query, prompts, checked.image)
            prompts = prompts if ranking is None else [rank.prompt for rank in ranking]
        if checked.verdict.flagged:
            reason = f"query: {checked.verdict.reason}"
            safety = safety.model_copy(update={"outcome": "rewritten", "reason": reason})
        best, *rest = prompts
        return self.result(checked, prompt=best, alternatives=rest[: n - 1], ranking=ranking, safety=safety)

    async def _let_out(
        self, prompts: list[str], wishes: Wishes, image: GivenImage | None
    ) -> tuple[list[str], SafetyVerdict | None]:
        """The prompts that leave the least unmet of those that the gate lets out; where it lets none out, why
        not the first."""
        fault: SafetyVerdict | None = None
        while prompts:
            best = wishes.best(prompts)
            verdicts = await self.gate.check_all(best, image)
            if good := [prompt for prompt, v in zip(best, verdicts, strict=True) if not v.flagged]:
                return good, None
            fault = fault or verdicts[0]
            if any(verdict.unavailable for verdict in verdicts):
                break
            prompts = [prompt for prompt in prompts if prompt not in best]
        return [], fault

    def candidates(self, fields: Mapping[str, Any], effort: Effort = "medium") -> int:
        """How many prompts the policy writes for one query."""
        return int(self._asked(fields, effort)["n"])

    def _asked(self, fields: Mapping[str, Any], effort: Effort) -> dict[str, Any]:
        if fields["temperature"] == 0:
            return {**fields, "n": 1}  # greedy candidates are all the same
        ranked = self.settings.best_of.n if self.settings.best_of is not None else 1
        least = {"low": 1, "medium": ranked, "high": 2 * ranked}[effort]
        return {**fields, "n": max(fields["n"], least)}


class _Clock:
    """Seconds of a query, by part."""

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
        """Count a streamed answer, without the time that its reader took after its end."""
        now = time.perf_counter()
        ended = now if ended is None else ended
        self._parts["optimiser"] = self._parts.get("optimiser", 0) + ended - began
        self._began += now - ended

    def latency(self) -> Latency:
        seconds = {**self._parts, "total": time.perf_counter() - self._began}
        return Latency(**{name: round(value, 4) for name, value in seconds.items()})


def refusal(safety: SafetyOutcome, param: str | None = "messages") -> ApiError:
    """A refused query as an error, for clients of the chat API and of jobs."""
    if safety.reason is not None and safety.reason.endswith(UNAVAILABLE):
        return ApiError(503, f"{safety.reason}; try again", code="safety_unavailable", headers=LATER)
    return ApiError(400, f"refused by the safety gate: {safety.reason}", param, "content_filter")


LATER = {"Retry-After": "2"}


def _facts(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Usage and fingerprint in a completion, or a chunk of one. Raises PolicyFailed for an error."""
    if "error" in reply:
        raise PolicyFailed(reply["error"]["message"], timeout=reply["error"].get("code") == "timeout")
    facts: dict[str, Any] = {}
    if usage := reply.get("usage"):
        facts["usage"] = TokenUsage(**{name: usage.get(name, 0) for name in TokenUsage.model_fields})
    if fingerprint := reply.get("system_fingerprint"):
        facts["system_fingerprint"] = fingerprint
    return facts


def _next_seed(seed: int | None) -> int | None:
    """Another seed for the same request, where it has one."""
    return None if seed is None else seed - 1 if seed == 2**63 - 1 else seed + 1


def _sum(first: TokenUsage | None, second: TokenUsage | None) -> TokenUsage:
    a, b = first or TokenUsage(), second or TokenUsage()
    return TokenUsage(**{name: getattr(a, name) + getattr(b, name) for name in TokenUsage.model_fields})


def _with_flags(query: str, flags: Sequence[GeneratorFlag]) -> str:
    """The query with its generator flags, which reach the video model too."""
    return join_flags(query, [Flag(flag.name, flag.value) for flag in flags])


def _refused(safety: SafetyOutcome, where: str, verdict: SafetyVerdict) -> SafetyOutcome:
    return safety.model_copy(update={"outcome": "refused", "reason": f"{where}: {verdict.reason}"})


def _told_unmet(result: Optimization, wishes: Wishes) -> Optimization:
    """The answer with the wishes that its prompt does not meet, whoever wrote that."""
    return result.model_copy(update={"unmet": wishes.unmet(result.prompt)}) if result.prompt else result


def _finished(result: Optimization, query: str, clock: _Clock) -> Optimization:
    changed = result.prompt is not None and result.prompt != query
    return result.model_copy(update={"changed": changed, "latency": clock.latency()})
