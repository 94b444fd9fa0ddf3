"""A dimension that a formula or an evolution's fitness names and no reward gives is found by the plan, where
that is known."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vpo_ray.plan.dimensions import fitness_problems, formula_problems
from vpo_ray.recipe import Recipe, RecipeError, load, plugins

RECIPES = Path(__file__).parents[2] / "jobs/recipes"
TINY = RECIPES / "tiny.yaml"
CHECKLIST = "questions:\n- {question: It is good, weight: 1, dimension: quality}\n"
MODULE = """
from pydantic import BaseModel
class Said:
    version = "1"
    class Options(BaseModel):
        head: str = "look"
    @staticmethod
    def dimensions(settings, options):
        if options.head == "broken":
            raise ValueError("no such head")
        return [options.head]
class Silent:
    version = "1"
    class Options(BaseModel):
        head: str = ""
class Fixed(Silent):
    dimensions = ("motion",)
"""


@pytest.fixture
def checklist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "said_dimensions.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_builder.cache_clear()
    path = tmp_path / "checklist.yaml"
    path.write_text(CHECKLIST, "utf-8")
    yield path
    plugins.load_builder.cache_clear()


def recipe(checklist: Path, terms: str, *more: str) -> Recipe:
    given = [f"reward.checklist.file={checklist}", f"formula={{terms: {terms}}}"]
    return load(TINY, [*given, *more])


def test_dimensions_of_a_checklist_and_of_vbench_are_known(checklist: Path) -> None:
    more = "more_rewards={still: {kind: vbench, dimensions: [temporal_flickering]}}"
    good = "{reward: 1, reward.score: 1, reward.quality: 1, still.temporal_flickering: 1}"
    assert list(formula_problems(recipe(checklist, good, more))) == []
    bad = recipe(checklist, "{reward.qualty: 1}", more, "formula.gates={still.motion: {above: 1}}")
    assert list(formula_problems(bad)) == [
        "formula.terms.reward.qualty: reward gives no dimension qualty; did you mean reward.quality?",
        "formula.gates.still.motion: still gives no dimension motion; there are: temporal_flickering",
    ]
    assert list(formula_problems(load(TINY))) == []


def test_a_plugin_may_say_its_dimensions_or_is_taken_on_trust(checklist: Path) -> None:
    def problems(kind: str, dimension: str, options: str = "{}") -> list[str]:
        more = f"more_rewards={{x: {{kind: 'said_dimensions:{kind}', options: {options}}}}}"
        return list(formula_problems(recipe(checklist, f"{{x.{dimension}: 1}}", more)))

    assert problems("Said", "look") == problems("Fixed", "motion") == problems("Silent", "any") == []
    assert "did you mean x.motion?" in problems("Fixed", "moton")[0]
    assert problems("Said", "look", "{head: style}") == [
        "formula.terms.x.look: x gives no dimension look; there are: style"
    ]
    assert "no such head" in problems("Said", "look", "{head: broken}")[0]


ALL_THREE = (
    "more_rewards={still: {kind: vbench, dimensions: [dynamic_degree]}, a: {kind: 'said_dimensions:Fixed'}, "
    "b: {kind: 'said_dimensions:Fixed'}}"
)


def test_the_fitness_of_an_evolution_names_scores_that_one_reward_gives(checklist: Path) -> None:
    def problems(key: str, name: str, third: str = "Fixed") -> list[str]:
        kinds = {
            "still": "{kind: vbench, dimensions: [dynamic_degree]}",
            "a": "{kind: 'said_dimensions:Fixed'}",
            "b": f"{{kind: 'said_dimensions:{third}'}}",
        }
        more = ", ".join(f"{reward}: {section}" for reward, section in kinds.items())
        evolve = f"evolve={{{key}: {{{name}: 1}}}}"
        return list(fitness_problems(recipe(checklist, "{reward: 1}", f"more_rewards={{{more}}}", evolve)))

    for good in ("reward", "still", "reward.quality", "quality", "dynamic_degree", "a.motion"):
        assert problems("fitness", good) == []
    assert problems("thresholds", "motion") == [
        "evolve.thresholds.motion: several rewards give it; say which: a.motion, b.motion"
    ]
    there = "reward, still, a, b, a.motion, b.motion, reward.quality, still.dynamic_degree"
    for bad in ("sound", "still.sound", "other.sound"):
        assert problems("fitness", bad) == [f"evolve.fitness.{bad}: no reward gives it; there are: {there}"]
        gates = f"{{terms: {{reward: 1, a: 1}}, gates: {{{bad}: {{above: 1}}}}}}"
        evolve = f"evolve={{fitness: {gates}}}"
        assert problems("fitness", "reward.score") == []
        (said,) = fitness_problems(recipe(checklist, "{reward: 1}", ALL_THREE, evolve))
        assert said == f"evolve.fitness.gates.{bad}: no reward gives it; there are: {there}"
    assert problems("fitness", "b.any", "Silent") == problems("fitness", "any", "Silent") == []
    assert problems("fitness", "still.sound", "Silent") != []
    assert list(fitness_problems(load(TINY))) == []


SEVEN = "formula={terms: {reward.visual_quality: 1, aesthetic.aesthetic: 1}}"


@pytest.mark.parametrize("name", ["prompt_a_video_cogvideox", "prompt_a_video_wan"])
def test_the_rewards_of_prompt_a_video_give_its_fitness(name: str) -> None:
    made = load(RECIPES / f"{name}.yaml", ["evolve={preset: prompt_a_video}"])
    assert made.evolve is not None
    assert len(made.evolve.fitness) == 7
    assert list(fitness_problems(made)) == []
    wrong = ["formula.terms.reward.dynamic_degre.weight=1", "formula.terms.mps.look.weight=1"]
    assert list(formula_problems(load(RECIPES / f"{name}.yaml", [SEVEN, *wrong]))) == [
        "formula.terms.reward.dynamic_degre: reward gives no dimension dynamic_degre; did you mean "
        "reward.dynamic_degree?",
        "formula.terms.mps.look: mps gives no dimension look; there are: mps",
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["formula={terms: {vlm.x: 1}}"], "formula.terms.vlm.x: no reward 'vlm' (there are reward)"),
        (["formula={terms: {}}"], "formula.terms: Value should have at least 1 item"),
        (["formula={terms: {reward: {weight: [1, 0]}}}"], "nothing has a weight in round 2"),
        (["formula={terms: {reward: {weit: 1}}}"], "terms.reward.weit: unknown key; did you mean `weight`"),
        (["formula={terms: {reward: {scale: 2}}, normalise: rank}"], "scale has no effect with normalise"),
        (["formula={terms: {reward: 1}, gates: {reward: {}}}"], "give `above`, `below` or both"),
        (["formula={terms: {reward: 1}, gates: {reward: {above: 2, below: 1}}}"], "no value is above 2"),
        (["pair.by=formula"], "pair.by: formula needs a section `formula`"),
        (["pair={by: formula, reward: vlm}"], "reward has no effect with by: formula"),
        (["pair={choice: all, video_per_query: 2}"], "video_per_query has no effect with choice: all"),
        (["pair={preset: vqo}"], "preset 'vqo' is not known; there are vpo, prompt_a_video"),
        (["pair.ranks=2", "render.strategy=adaptive"], "pair.ranks looks at all of a query"),
    ],
)  # fmt: skip
def test_a_formula_that_cannot_be_is_refused_with_the_key(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(TINY, overrides)
    assert says in str(caught.value)


def test_a_term_is_changed_on_the_command_line() -> None:
    base = ["formula={terms: {reward.quality: {weight: 2, above: 1}}}"]
    changed = load(TINY, [*base, "formula.terms.reward.quality.weight=3"])
    assert changed.formula is not None
    term = changed.formula.terms["reward.quality"]
    assert (term.weight, term.above) == (3.0, 1.0)
    assert changed.fingerprint() != load(TINY, base).fingerprint() != load(TINY).fingerprint()
