"""Wishes of a request: words that stay, a length, a long query that is left alone, and effort."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.prompts.conditions import CAPTION_FIELDS
from vpo_ray.recipe import Serve
from vpo_ray.recipe.serve import BestOf, Safety
from vpo_ray.serve.answers import completion
from vpo_ray.serve.errors import ApiError
from vpo_ray.serve.optimiser import Optimiser
from vpo_ray.serve.optimize_schema import parse_optimize
from vpo_ray.serve.policy import PolicyFailed, overloaded
from vpo_ray.serve.ranking import Ranker
from vpo_ray.serve.safety import Gate
from vpo_ray.serve.wishes import NO_WISHES, Effort, Wishes

PROMPTS = st.lists(st.text("ab ", max_size=12), min_size=1, max_size=5)


class Policy:
    """Answers with the prompts that it was given, one request after the other; notes the seeds."""

    def __init__(self, *replies: list[str]) -> None:
        self.replies, self.seeds = list(replies), []  # type: tuple[list[list[str]], list[Any]]

    async def answer(self, query: str, fields: Any, request_id: str, image: None) -> dict[str, Any]:
        self.seeds.append(fields["seed"])
        choices = [{"message": {"content": text}} for text in self.replies.pop(0)]
        return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def asked(policy: Policy, wishes: Wishes, query: str = "a red ball", seed: int | None = 5) -> Any:
    settings = Serve()
    optimiser = Optimiser(policy, Gate(settings.safety), None, settings)  # type: ignore[arg-type]
    fields = {"n": 1, "temperature": 0.7, "seed": seed}
    return asyncio.run(optimiser(query, fields, "id", (), wishes))


def test_a_prompt_that_meets_them_is_asked_for_once() -> None:
    policy = Policy(["A RED  ball rolls."])
    result = asked(policy, Wishes(("red ball",), 10))
    assert (result.prompt, result.unmet, policy.seeds) == ("A RED  ball rolls.", [], [5])


def test_where_none_meets_them_it_is_asked_once_more() -> None:
    policy = Policy(["A ball rolls over green grass."], ["A red ball rolls."])
    result = asked(policy, Wishes(("red",), 5))
    assert (result.prompt, result.unmet, policy.seeds) == ("A red ball rolls.", [], [5, 6])
    assert result.usage.completion_tokens == 10


def test_what_is_still_unmet_is_told() -> None:
    policy = Policy(["A ball rolls over green grass."], ["A red ball rolls over green grass."])
    result = asked(policy, Wishes(("red",), 5), seed=None)
    assert result.prompt == "A red ball rolls over green grass."
    assert result.unmet == ["max_words: 7"]
    assert policy.seeds == [None, None]


def test_what_the_query_does_not_meet_is_told_where_it_is_the_answer() -> None:
    fields = {"n": 1, "temperature": 0.7, "seed": 5}
    for wishes, fallback, replies in (
        (Wishes(("red", "dog"), 2), True, [[""], [""]]),
        (Wishes(("dog",), 2, skip_if_words=3), False, []),
    ):
        settings = Serve(fallback=True)
        optimiser = Optimiser(Policy(*replies), Gate(settings.safety), None, settings)  # type: ignore[arg-type]
        result = asyncio.run(optimiser("a red ball", fields, "id", (), wishes))
        assert (result.prompt, result.fallback) == ("a red ball", fallback)
        assert result.unmet == ["keep: dog", "max_words: 3"]


def test_a_prompt_that_is_cut_comes_after_whole_ones_and_is_told() -> None:
    class Cutting(Policy):
        async def answer(self, query: str, fields: Any, request_id: str, image: None) -> dict[str, Any]:
            reply = await super().answer(query, fields, request_id, image)
            for choice in reply["choices"]:
                whole = choice["message"]["content"].endswith(".")
                choice["finish_reason"] = "stop" if whole else "length"
            return reply

    mixed = asked(Cutting(["A red ball ro", "A red ball."]), NO_WISHES)
    assert (mixed.prompt, mixed.cut) == ("A red ball.", False)
    none_whole = asked(Cutting(["A red ball ro"]), NO_WISHES)
    assert (none_whole.prompt, none_whole.cut) == ("A red ball ro", True)
    assert completion(none_whole, "id")["choices"][0]["finish_reason"] == "length"
    assert completion(mixed, "id")["choices"][0]["finish_reason"] == "stop"
    again = asked(Cutting(["A ba"], ["A ball."]), Wishes(("red",)))
    assert (again.prompt, again.cut) == ("A ball.", False)


class Failing(Policy):
    """Answers once, and is overloaded or out of order then."""

    def __init__(self, error: Exception) -> None:
        super().__init__(["A ball."])
        self.error = error

    async def answer(self, query: str, fields: Any, request_id: str, image: None) -> dict[str, Any]:
        if self.seeds:
            raise self.error
        return await super().answer(query, fields, request_id, image)


@pytest.mark.parametrize("error", [overloaded(429), PolicyFailed("no answer", timeout=True)])
def test_what_was_written_is_the_answer_where_asking_again_fails(error: Exception) -> None:
    result = asked(Failing(error), Wishes(("red",)))
    assert (result.prompt, result.unmet) == ("A ball.", ["keep: red"])


def test_a_safe_prompt_is_the_answer_though_an_unsafe_one_meets_more_wishes(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("knife", "utf-8")
    safety = Safety(prompt=True, keywords=str(tmp_path / "words"))
    policy = Policy(["A red knife.", "A ball of any colour.", "A ball."])
    optimiser = Optimiser(policy, Gate(safety), None, Serve(safety=safety))  # type: ignore[arg-type]
    fields = {"n": 3, "temperature": 0.7, "seed": 5}
    result = asyncio.run(optimiser("a red ball", fields, "id", (), Wishes(("red",), 3)))
    assert (result.prompt, result.alternatives, result.unmet) == ("A ball.", [], ["keep: red"])
    assert result.safety.outcome == "pass"


def test_a_long_query_is_left_as_it_is() -> None:
    result = asked(Policy(), Wishes(skip_if_words=3))
    assert (result.prompt, result.skipped, result.changed, result.fallback) == (
        "a red ball",
        True,
        False,
        False,
    )
    assert not asked(Policy(["A ball."]), Wishes(skip_if_words=4)).skipped


@pytest.mark.parametrize("query", ["rewrite", "off", "refuse"])
def test_a_long_query_that_the_gate_flags_is_rewritten_where_the_recipe_says_so(
    tmp_path: Path, query: Any
) -> None:
    (tmp_path / "words").write_text("knife", "utf-8")
    safety = Safety(query=query, prompt=True, keywords=str(tmp_path / "words"))
    optimiser = Optimiser(Policy(["A ball."]), Gate(safety), None, Serve(safety=safety))  # type: ignore[arg-type]
    fields = {"n": 1, "temperature": 0.7, "seed": 5}
    result = asyncio.run(optimiser("a red knife", fields, "id", (), Wishes(skip_if_words=3)))
    refused = query == "refuse"
    assert (result.prompt, result.skipped) == (None if refused else "A ball.", False)
    assert result.safety.outcome == {"rewrite": "rewritten", "off": "pass", "refuse": "refused"}[query]


def test_words_are_counted_in_any_script() -> None:
    assert Wishes(max_words=3).unmet("红色的球") == ["max_words: 4"]
    assert Wishes(("Ｒｅｄ",)).unmet("a red ball") == []


class Writer:
    """Writes as many prompts as it is asked for, each longer than the one before."""

    async def answer(self, query: str, fields: Any, request_id: str, image: None) -> dict[str, Any]:
        texts = [" ".join(["a red ball"] * (number + 1)) for number in range(fields["n"])]
        return {"choices": [{"message": {"content": text}} for text in texts]}


def by_length(path: str, request: dict[str, Any]) -> tuple[int, Any]:
    scores = [{"index": i, "relevance_score": len(text)} for i, text in enumerate(request["documents"])]
    return 200, {"results": scores}


@pytest.mark.parametrize(
    ("effort", "n", "written", "ranked"),
    [("low", 1, 1, None), ("low", 2, 2, None), ("medium", 1, 3, 3), ("high", 1, 6, 6), ("high", 9, 9, 9)],
)
def test_effort_is_how_many_prompts_are_ranked(
    outside: Callable[..., Any], effort: Effort, n: int, written: int, ranked: int | None
) -> None:
    best_of = BestOf(n=3, rerank=outside(by_length).service())
    settings = Serve(best_of=best_of)
    optimiser = Optimiser(Writer(), Gate(settings.safety), Ranker(best_of), settings)  # type: ignore[arg-type]
    fields = {"n": n, "temperature": 0.7, "seed": None}
    wishes = Wishes(effort=effort)
    result = asyncio.run(optimiser("a ball", fields, "id", (), wishes))
    assert optimiser.candidates(fields, effort) == written, "what a caller's quota counts"
    assert (None if result.ranking is None else len(result.ranking)) == ranked
    assert result.prompt == " ".join(["a red ball"] * (ranked or 1))
    assert len(result.alternatives) == n - 1
    assert optimiser.streams(n, wishes) == (effort == "low" and n == 1)
    assert not optimiser.streams(1, Wishes(max_words=3, effort="low")), "it is checked first"


def test_effort_is_refused_where_it_has_no_effect(outside: Callable[..., Any]) -> None:
    ranks = Serve(best_of=BestOf(rerank=outside(by_length).service()))
    for settings, effort, status in (
        (ranks, "high", None),
        (ranks, "most", 422),
        (Serve(), "high", 422),
        (Serve(), "low", None),
        (Serve(), None, None),
    ):
        body = json.dumps({"query": "q", "effort": effort}).encode()
        if status is None:
            assert parse_optimize(body, settings).wishes.effort == (effort or "medium")
        else:
            with pytest.raises(ApiError, match=r"ranks no candidates|'low', 'medium' or 'high'") as refused:
                parse_optimize(body, settings)
            assert refused.value.status == status


def test_words_that_stay_away_and_a_language() -> None:
    wishes = Wishes(avoid=("cat", "8k uhd"), language="zh")
    assert wishes.of_prompts
    assert wishes.unmet("A Cat, 8K-UHD") == ["avoid: cat", "avoid: 8k uhd", "language: zh"]
    assert wishes.unmet("一只猫，category") == []
    policy = Policy(["A ball."], ["红色的球。"])
    result = asked(policy, Wishes(language="zh"))
    assert (result.prompt, result.unmet) == ("红色的球。", [])


@given(PROMPTS, st.integers(1, 4))
def test_the_best_leave_the_least_unmet(prompts: list[str], most: int) -> None:
    wishes = Wishes(("a", "b"), most)
    best = wishes.best(prompts)
    assert best
    assert {len(wishes.unmet(p)) for p in best} == {min(len(wishes.unmet(p)) for p in prompts)}


def test_requests_have_wishes() -> None:
    def parsed(**body: Any) -> Wishes:
        return parse_optimize(json.dumps({"query": "q", **body}).encode(), Serve()).wishes

    assert parsed() == NO_WISHES
    assert parsed(keep=["red"], max_words=9, skip_if_words=40) == Wishes(("red",), 9, 40)
    assert parsed(avoid=["8k"], language="de") == Wishes(avoid=("8k",), language="de")
    for bad in (
        {"avoid": ["x" * 201]},
        {"language": "tlh"},
        {"language": "German"},
        {"keep": "red"},
        {"keep": [""]},
        {"keep": ["x"] * 17},
        {"max_words": 0},
        {"skip_if_words": "1"},
    ):
        with pytest.raises(ApiError) as refused:
            parsed(**bad)
        assert refused.value.status == 422


def test_a_request_may_ask_for_json() -> None:
    def parsed(settings: Serve, **body: Any) -> Wishes:
        return parse_optimize(json.dumps({"query": "q", **body}).encode(), settings).wishes

    assert parsed(Serve(), format="json").fields == CAPTION_FIELDS
    assert parsed(Serve(caption_fields=["what"]), format="json").fields == ("what",)
    assert parsed(Serve(), format="text") == NO_WISHES
    with pytest.raises(ApiError, match="'text' or 'json'"):
        parsed(Serve(), format="xml")
    caption = '{"what": "a ball", "where": "a roof"}'
    policy = Policy(["A ball."], ['{"where": "a\\nroof",  "what": "a ball"}'])
    result = asked(policy, Wishes(max_words=4, fields=("what", "where")))
    assert (result.prompt, result.unmet, policy.seeds) == (caption, [], [5, 6])


@pytest.mark.ray
@pytest.mark.engine
def test_the_engine_is_told_and_writes_json(endpoint: Callable[..., str]) -> None:
    """Random weights, which never begin with a brace by themselves."""

    def answer(where: str, **body: Any) -> Any:
        asked = {"query": "a cat", "seed": 3, **body}
        return httpx.post(f"{where}/optimize", json=asked, timeout=120).raise_for_status().json()

    plain = endpoint("untold", max_tokens=120, caption_fields=["a"])
    told = endpoint("told", max_tokens=120, caption_fields=["a"], tell_wishes=True)
    tokens = [answer(where, max_words=4000)["usage"]["prompt_tokens"] for where in (plain, told)]
    assert tokens[0] == answer(plain)["usage"]["prompt_tokens"] == answer(told)["usage"]["prompt_tokens"]
    assert tokens[1] > tokens[0] + 10
    for where in (plain, told):
        found = answer(where, format="json")
        assert found["prompt"].startswith("{")
        if not found["unmet"]:
            assert set(json.loads(found["prompt"])) == {"a"}
