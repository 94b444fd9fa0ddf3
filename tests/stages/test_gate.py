"""The gate of the render stage: prompts below it are not rendered, and are counted with the reason."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from vpo_ray.engines.video import VideoModel
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.recipe import Recipe, RecipeError, Render, RenderGate, load, parse_stored
from vpo_ray.recipe.plugins import PluginError
from vpo_ray.records import FEEDBACK, Row
from vpo_ray.stages import made_with
from vpo_ray.stages.adaptive import decide, videos_by_strategy
from vpo_ray.stages.gate import PromptGate, is_below
from vpo_ray.stages.render import Renderer, wants
from vpo_ray.stages.spec import Making, stage
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
GATE = "gate={options: {words: [3, 5]}, least: {length: 1}}"
REASON = "below the gate: length under 1"


class Grey(VideoModel):
    """A video model of the test's own, whose prompts are kept."""

    from pydantic import BaseModel

    class Options(BaseModel):
        pass

    version = "1"
    seen: ClassVar[list[str]] = []

    def __init__(self, settings: Render, options: Options) -> None:
        self.settings = settings

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | bytes | Exception]:
        self.seen.extend(prompts)
        return [np.full((5, 16, 16, 3), 128, np.uint8) for _ in prompts]


def recipe_of(*sets: str) -> Recipe:
    return load(TINY, [f"render={{kind: '{__name__}:Grey', frames: 5, height: 16, width: 16}}", *sets])


def row(k: int, prompt: str, verdict: str = "aligned", **more: Any) -> Row:
    empty = dict.fromkeys(FEEDBACK.names)
    base = {"candidate_id": str(k), "query_id": "q", "query": "a cat", "k": k, "seed": 1}
    return {**empty, **base, "prompt": prompt, "verdict": verdict, **more}


def renderer(recipe: Recipe, tmp_path: Path) -> Renderer:
    from vpo_ray.engines.endpoint.account import Account

    made: Renderer = stage("render").make(Making(recipe, str(tmp_path / "videos"), Account()))()
    return made


def test_only_prompts_that_reach_it_are_rendered(tmp_path: Path) -> None:
    Grey.seen.clear()
    rows = [row(0, "a cat"), row(1, "a cat sits still"), row(2, "short", verdict="unsafe"), row(3, " ")]
    failed = row(4, "a", error="gone", error_stage="judge")
    done = renderer(recipe_of(GATE), tmp_path)([*rows, failed])
    assert Grey.seen == ["a cat sits still"]
    assert [r["skipped"] for r in done] == [REASON, None, None, None, None]
    assert [r["video_key"] is not None for r in done] == [False, True, False, False, False]
    assert (done[3]["error_stage"], done[3]["error"]) == ("render", "the gate: the prompt is empty")
    assert done[4] == failed
    assert not wants(done[0])
    assert is_below(done[0])
    assert stage("render").make is not None


def test_what_it_stopped_is_in_the_ledger_with_the_reason(tmp_path: Path) -> None:
    recipe = recipe_of(GATE, f"out={tmp_path / 'run'}", "sample.k=3")
    run = RunDir(recipe.out)
    query = {"query_id": "q", "query": "a cat", "split": "dpo"}
    run.table("queries").append([{**dict.fromkeys(run.table("queries").schema.names), **query}])
    rows = [row(0, "a cat"), row(1, "a cat sits still"), row(2, "so many words are too many words")]
    for name in ("candidates", "verdicts"):
        run.table(name).append(rows)
    done = renderer(recipe, tmp_path)(rows)
    run.table("renders").append(done)
    score = [{**r, "score": 1.0, "seconds": {"score": 1.0}} if r["video_key"] else r for r in done]
    run.table("feedback").append(score)
    ledger = build_ledger(run, recipe)
    assert ledger["stages"]["render"]["skipped"] == {REASON: 2}
    assert ledger["stages"]["render"]["out"] == ledger["stages"]["score"]["in"] == 1
    assert not [line for line in reconcile(ledger) if line.startswith(("render", "score"))]


def test_adaptive_rendering_goes_on_to_the_next_prompt() -> None:
    recipe = recipe_of("render.strategy=adaptive")
    stopped = [row(0, "a", skipped=REASON), row(1, "b", skipped=REASON)]
    waiting = [row(2, "a cat sits"), row(3, "a cat sleeps"), row(4, "a cat runs")]
    assert decide([*stopped, *waiting], recipe.pair) == {"2": None, "3": None}
    assert decide([*stopped, waiting[0]], recipe.pair)["2"] is not None, "one prompt alone makes no pair"
    assert videos_by_strategy([*stopped, *waiting], recipe.pair)["all"] == 3
    assert decide(stopped, recipe.pair) == {}, "and none of them is taken again"


def test_several_dimensions_must_all_be_reached(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat", "utf-8")
    options = {"words": [2, 5], "required": str(tmp_path / "words.txt")}
    gate = PromptGate(RenderGate(options=options, least={"required": 1, "length": 0.5, "score": 0.8}))
    texts = ["a dog", "a cat", "a cat " * 6, "cat"]
    found = [r["skipped"] for r in gate.judged([row(k, text) for k, text in enumerate(texts)])]
    assert [why and why.removeprefix("below the gate: ") for why in found] == [
        "required under 1", None, "length under 0.5", "score under 0.8",
    ]  # fmt: skip


def test_recipes_without_a_gate_are_what_they_were() -> None:
    plain, gated = recipe_of(), recipe_of(GATE)
    assert plain.gate is None
    assert gated.fingerprint() != plain.fingerprint() == recipe_of("gate=null").fingerprint()
    assert parse_stored(gated.dump(), "run") == gated
    assert gated.gate is not None
    assert gated.gate.kind.endswith("prompt_text:PromptText@1")
    other = recipe_of(GATE.replace("length: 1", "length: 0.5"))
    assert other.fingerprint() != gated.fingerprint()
    assert recipe_of(GATE.replace("}}", "}, device: cuda}", 1)).fingerprint() == gated.fingerprint()
    assert not [key for key in made_with.facts(plain, "render") if key.startswith("gate")]
    assert "gate.kind" in made_with.facts(gated, "render")


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("{options: {words: [3, 5]}, least: {}}", "gate.least"),
        ("{options: {words: [3, 5]}}", "gate.least: missing"),
        ("{options: {word: [3, 5]}, least: {length: 1}}", "gate.options.word: unknown key"),
        ("{options: {words: [3, 5]}, least: {length: .nan}}", "gate.least.length"),
    ],
)
def test_a_gate_without_sense_is_refused_by_its_key(gate: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(f"gate={gate}")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("{options: {words: [3, 5]}, least: {lenght: 1}}", "gate.least.lenght: "),
        ("{options: {encoder: /not/here}, least: {similarity: 0.5}}", "gate.options.encoder: no such folder"),
        ("{options: {required: ./no.txt}, least: {required: 1}}", "gate.options.required: no such file"),
        ("{kind: txt, least: {length: 1}}", "gate.kind: 'txt' is no kind"),
        ("{kind: http, least: {length: 1}}", "HttpScorer reads no prompts"),
    ],
)
def test_a_plan_finds_what_a_gate_lacks(gate: str, says: str) -> None:
    with pytest.raises(PlanError) as refused:
        check_recipe(recipe_of(f"gate={gate}"))
    assert says in str(refused.value)


def test_a_reward_that_reads_no_prompts_is_no_gate() -> None:
    with pytest.raises(PluginError, match=r"gate\.kind: .*HttpScorer reads no prompts"):
        PromptGate(RenderGate(kind="http", least={"score": 1}))
    with pytest.raises(PluginError, match=r"gate\.least\.similarity: .* gives length"):
        PromptGate(RenderGate(options={"words": [1, 2]}, least={"similarity": 0.5}))
