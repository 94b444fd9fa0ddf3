"""What policies that are LLMs write: few-shot ones as drafts are written, others on the query alone."""

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer, Reply, Request, completion, failure
from PIL import Image

from vpo_ray.engines.chat import Answer, Message, Sampling
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.plan.check import PlanError, check_recipe
from vpo_ray.prompts.answers import AnswerError
from vpo_ray.recipe import EvaluatedPolicy, Recipe, RecipeError, load
from vpo_ray.records import FEEDBACK, Row, query_id, table
from vpo_ray.stages import spec
from vpo_ray.stages.chains import CHAINS
from vpo_ray.stages.draft import Drafter
from vpo_ray.stages.made_with import facts
from vpo_ray.stages.rewrite import Rewriter, as_candidate
from vpo_ray.storage.images import images_of
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.pipeline import Models, generate
from vpo_ray.stream.spending import endpoint_cost

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
SFT = Path(__file__).parents[2] / "vpo_ray/data/sft.jsonl"
EXAMPLES = [
    {"query_id": query_id(f"example {i}"), "query": f"example {i}", "prompt": f"A long scene {i}."}
    for i in range(10)
]
LLM = {"model": "m", "backend": "openai"}
Serve = Callable[[Callable[[Request], Reply]], EndpointServer]


class Endpoint:
    """Stands for the LLM service outside: gives one answer, keeps what it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[tuple[str, Sampling, Any]] = []

    async def complete(
        self, messages: Sequence[Message], sampling: Sampling, schema: dict[str, Any] | None = None
    ) -> Answer:
        self.asked.append((messages[0]["content"], sampling, schema))
        return Answer(self.text, "stop", 10, 5)


def recipe_with(policy: dict[str, Any], *more: str) -> Recipe:
    return load(TINY, [f"evaluate={json.dumps({'policies': {'p-1.5': policy}})}", *more])


def blank(recipe: Recipe, query: str = "a cat") -> Row:
    asked = {"query_id": query_id(query), "query": query, "unsafe": None, "split": "eval"}
    (row,) = CHAINS["rewriting"].expand(recipe, Models("", "p"))([asked])
    return {**dict.fromkeys(FEEDBACK.names), **row}


def rewrite(text: str, **policy: Any) -> tuple[Row, Endpoint]:
    given = {"kind": "endpoint", "llm": LLM, **policy}
    endpoint = Endpoint(text)
    recipe = recipe_with(given, f"draft={{examples: {SFT}}}")
    settings = EvaluatedPolicy.model_validate(given)
    done = asyncio.run(Rewriter(settings, EXAMPLES, 2000)(blank(recipe), endpoint))
    assert table([as_candidate(done)], FEEDBACK).num_rows == 1
    return done, endpoint


def test_an_endpoint_is_sent_the_query_alone() -> None:
    done, endpoint = rewrite("<think>hm</think> A grey cat. ", temperature=0.5, max_tokens=9)
    asked, sampling, schema = endpoint.asked[0]
    assert (asked, schema) == ("a cat", None)
    assert sampling == Sampling(0.5, 9, done["seed"])
    assert (done["prompt"], done["finish_reason"]) == ("A grey cat.", "stop")
    assert (done["prompt_tokens"], done["completion_tokens"]) == (10, 5)
    assert (done["policy"], done["k"]) == ("p", 0)


def test_a_template_quotes_the_query(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Improve: {query}", "utf-8")
    _, endpoint = rewrite("x", prompt=str(tmp_path / "t.txt"))
    assert endpoint.asked[0][0] == 'Improve: "a cat"'


@pytest.mark.parametrize(("text", "why"), [("  ", "empty"), ("<think>so", "UnclosedThought")])
def test_an_answer_without_a_prompt_is_an_error_of_the_row(text: str, why: str) -> None:
    done, _ = rewrite(text)
    assert why in done["error"]
    assert (done["error_stage"], as_candidate(done)["error_stage"]) == ("rewrite", "sample")


def test_a_few_shot_policy_is_asked_as_the_drafter_is() -> None:
    """With the same settings, the same examples and words for a row of the same seed."""
    done, endpoint = rewrite('{"prompt": " A grey cat. "}', kind="few_shot", shots=2, temperature=0.7)
    assert done["prompt"] == "A grey cat."
    recipe = recipe_with({"kind": "few_shot"}, f"draft={{examples: {SFT}, shots: 2}}")
    assert recipe.draft is not None
    drafting = Endpoint('{"prompt": "A grey cat."}')
    asyncio.run(
        Drafter(recipe.draft, recipe.judge, EXAMPLES).few_shot.ask({**done, "prompt": None}, drafting)
    )
    (asked, sampling, schema), (drafted, as_drafted, of_draft) = endpoint.asked[0], drafting.asked[0]
    assert (asked, sampling) == (drafted, as_drafted)
    assert schema.keys() == of_draft.keys()
    assert asked.count("A long scene") == 2
    with pytest.raises(AnswerError, match="no text `prompt`"):
        rewrite('{"text": "x"}', kind="few_shot")


def test_the_llm_is_named_by_its_key() -> None:
    named = recipe_with({"kind": "few_shot", "llm": LLM, "examples": str(SFT)})
    assert spec.stage("rewrite").key(named) == "evaluate.policies.p-1.5.llm"
    assert spec.stage("rewrite").of(named).model == "m"
    assert "evaluate.policies.p-1.5.examples" in facts(named, "rewrite")
    unset = recipe_with({"kind": "few_shot", "examples": str(SFT)})
    assert spec.stage("rewrite").key(unset) == "judge"


@pytest.mark.parametrize("policies", ["{}", "[query]", "[query, base]"])
def test_other_recipes_have_no_such_stage(policies: str, tmp_path: Path) -> None:
    recipe = load(TINY, [f"evaluate={{policies: {policies}}}", f"out={tmp_path / 'run'}"])
    assert not spec.stage("rewrite").in_recipe(recipe)
    assert not spec.stage("rewrite").is_due(recipe)
    assert "rewrite" not in build_ledger(RunDir(recipe.out), recipe)["stages"]


def test_what_a_policy_lacks_is_told_when_the_recipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate.policies.p-1.5.examples is missing"):
        recipe_with({"kind": "few_shot"})
    (tmp_path / "t.txt").write_text("Improve this", "utf-8")
    recipe = recipe_with({"kind": "endpoint", "llm": LLM, "prompt": str(tmp_path / "t.txt")})
    with pytest.raises(PlanError, match=r"policies.p-1.5.prompt: \S+ needs the slot {query} once"):
        check_recipe(recipe)


@pytest.mark.ray
def test_a_policy_behind_an_endpoint_writes_once_and_pays(
    tmp_path: Path, ray_cluster: None, serve_endpoint: Serve
) -> None:
    def answer(request: Request) -> Reply:
        content = request["messages"][0]["content"]
        # With an image, its part and the query: as a client of our own endpoint sends it.
        query = content if isinstance(content, str) else content[1]["text"]
        return failure(403, "our content policy") if "gore" in query else completion(f"A film: {query}")

    server = serve_endpoint(answer)
    endpoint = {"base_url": server.url, "api_key_env": None, "retries": 0, "prompt_price": 1.0}
    llm = {**LLM, "endpoint": endpoint, "pool": {"size": 1, "num_cpus": 0.1}}
    recipe = recipe_with({"kind": "endpoint", "llm": llm}, f"out={tmp_path / 'run'}")
    run = RunDir(recipe.out)
    queries = ["a cat", "a dog", "a bird", "gore"]
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "PNG")
    images = {"a bird": images_of(run).put(file.getvalue())}
    run.table("unwritten").append(
        [
            {"query_id": query_id(q), "query": q, "image": images.get(q), "split": "eval", "unsafe": None}
            for q in queries
        ]
    )
    for _ in range(2):
        generate(recipe, run, Models("", "p"), ("rewrite",))
    assert len(server.requests) == 4, "a second call asks nothing"
    rows = {row["query"]: row for row in run.table("rewrites").rows()}
    assert rows["a cat"]["prompt"] == "A film: a cat"
    assert rows["a bird"]["prompt"] == "A film: a bird"
    assert sum(isinstance(request["messages"][0]["content"], list) for request in server.requests) == 1
    assert rows["gore"]["prompt"] is None
    assert (rows["gore"]["error"].split(":")[0], rows["gore"]["error_stage"]) == ("Refusal", "rewrite")
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    counted = ledger["stages"]["rewrite"]
    assert (counted["in"], counted["out"], sum(counted["errored"].values())) == (4, 3, 1)
    assert counted["cost"] == pytest.approx(3 / 1000)
    assert endpoint_cost(run) == pytest.approx(3 / 1000)
    run.table("candidates").append([as_candidate(row) for row in rows.values()])
    assert build_ledger(run, recipe)["stages"]["sample"]["out"] == 3
