"""A run directory's pairs are chosen anew by another formula, from the raw dimensions that its rows keep."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vpo_ray.loop.ledger import alarms, build_ledger
from vpo_ray.loop.opening import OtherRecipeError, open_run
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.policies import LoopError
from vpo_ray.recipe import Recipe, load, parse
from vpo_ray.storage.run_dir import ROUND, RunDir

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
MORE = "more_rewards={vlm: {kind: vbench, dimensions: [dynamic_degree, temporal_flickering]}}"
GATE = "formula.gates: vlm.temporal_flickering not above 0.5"
# By query and candidate: the reward's score, and vlm's two dimensions.
VALUES = {
    "a": [(1.0, 5.0, 1.0), (2.0, 3.0, 1.0), (3.0, 1.0, 1.0)],
    "b": [(1.0, 4.0, 1.0), (2.0, 3.0, 1.0), (3.0, 2.0, 0.0)],
    "c": [(1.0, 1.0, 0.0), (3.0, 9.0, 0.0)],
}


def recipe_of(tmp_path: Path, *more: str) -> Recipe:
    return load(
        TINY,
        [
            f"out={tmp_path / 'run'}",
            "pair={by: formula, dominance: none, choice: best, margin: 0.5}",
            MORE,
            *more,
        ],
    )


def by(terms: str, gates: str = "{}") -> str:
    return f"formula={{terms: {terms}, gates: {gates}}}"


def feedback(query: str, k: int, score: float, motion: float, flicker: float) -> dict[str, Any]:
    dimensions = [
        {"name": "dynamic_degree", "score": motion},
        {"name": "temporal_flickering", "score": flicker},
    ]
    vlm = {"name": "vlm", "reward": "vbench", "answers": [], "dimensions": dimensions, "score": motion}
    return {
        "candidate_id": f"{query}-{k}", "query_id": query, "query": query, "k": k, "seed": k,
        "prompt": f"prompt {k}", "verdict": "aligned", "video_key": f"{query}{k}", "score": score,
        "answers": [], "dimensions": [], "more_rewards": [vlm],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = open_run(recipe_of(tmp_path, by("{reward: 1}")))
    run.table("feedback").append(
        [feedback(query, k, *values) for query, rows in VALUES.items() for k, values in enumerate(rows)]
    )
    return run


def chosen(run: RunDir) -> dict[str, str]:
    return {row["query_id"]: row["chosen"] for row in run.table("pairs").rows()}


def test_another_formula_pairs_anew_in_the_same_run_directory(run: RunDir, tmp_path: Path) -> None:
    make_pairs(recipe_of(tmp_path, by("{reward: 1}")), run)
    assert chosen(run)["a"] == "prompt 2"
    other = recipe_of(tmp_path, by("{vlm.dynamic_degree: 1}"), "pair.margin=0.1")
    make_pairs(other, open_run(other))
    assert chosen(run) == {"a": "prompt 0", "b": "prompt 0", "c": "prompt 1"}
    assert load(tmp_path / "run/recipe.yaml") == other, "the run says what its pairs were chosen by"


def test_the_same_recipe_says_nothing_of_new_pairs(
    run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    open_run(recipe_of(tmp_path, by("{reward: 1}")))
    assert caplog.messages == []
    open_run(recipe_of(tmp_path, by("{vlm.dynamic_degree: 1}")))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("phase", "what"), [("dpo", "pairs"), ("rl", "groups")])
def test_a_policy_that_was_trained_by_the_old_rule_is_not_lost(phase: str, what: str, tmp_path: Path) -> None:
    def recipe(terms: str) -> Recipe:
        tree = yaml.safe_load(TINY.read_text("utf-8"))
        tree |= {"out": str(tmp_path / "run"), "pair": {"by": "formula"}, "formula": {"terms": {terms: 1}}}
        if phase == "rl":
            tree |= {"dpo": None, "rl": {"epochs": 1, "lr": 1e-6, "global_batch": 4}}
        return parse(tree, "recipe.yaml")

    run = open_run(recipe("reward"))
    run.write_json(f"checkpoints/{phase}/vpo.json", {})
    lost = rf"formula.terms(?s:.*)how {what} are(?s:.*)delete .*checkpoints/{phase}, which was trained in"
    with pytest.raises(OtherRecipeError, match=lost):
        open_run(recipe("reward.motion"))
    run.delete(f"checkpoints/{phase}/vpo.json")
    open_run(recipe("reward.motion"))


@pytest.mark.parametrize("strategy", ["all", "adaptive"])
def test_a_phase_that_is_not_trained_yet_may_learn_otherwise(strategy: str, tmp_path: Path) -> None:
    """Its feedback may have cost a week, which fewer rows a pack must not cost again."""
    given = by("{reward: 1}"), f"render.strategy={strategy}"
    run = open_run(recipe_of(tmp_path, *given))
    run.table("feedback").append([feedback("a", 0, 1.0, 1.0, 1.0)])
    other = recipe_of(tmp_path, *given, "dpo.micro_batch=7", "dpo.save_steps=50")
    open_run(other)
    assert load(tmp_path / "run/recipe.yaml") == other
    run.write_json("checkpoints/dpo/vpo.json", {})
    with pytest.raises(OtherRecipeError, match=r"dpo.micro_batch: 7 -> (?s:.*)delete .*checkpoints/dpo"):
        open_run(recipe_of(tmp_path, *given))
    open_run(other)


def test_sft_may_learn_otherwise_until_there_is_what_comes_from_it(tmp_path: Path) -> None:
    run = open_run(recipe_of(tmp_path, by("{reward: 1}")))
    smaller = recipe_of(tmp_path, by("{reward: 1}"), "sft.micro_batch=7", "dpo.micro_batch=7")
    open_run(smaller)
    with pytest.raises(OtherRecipeError, match=r"sft.data"):
        open_run(recipe_of(tmp_path, by("{reward: 1}"), "sft.data=other.jsonl"))
    run.table("candidates").append([feedback("a", 0, 1.0, 1.0, 1.0)])
    with pytest.raises(OtherRecipeError, match=r"sft.micro_batch"):
        open_run(recipe_of(tmp_path, by("{reward: 1}"), "dpo.micro_batch=7"))


def test_a_phase_may_be_added_but_not_changed_into_another(tmp_path: Path) -> None:
    tree = yaml.safe_load(TINY.read_text("utf-8")) | {"out": str(tmp_path / "run"), "pair": {"by": "score"}}
    rl = {"epochs": 1, "lr": 1e-6, "global_batch": 4}
    open_run(parse(tree | {"dpo": None}, "recipe.yaml"))
    open_run(parse(tree, "recipe.yaml"))
    with pytest.raises(OtherRecipeError, match=r"rl.lr"):
        open_run(parse(tree | {"dpo": None, "rl": rl}, "recipe.yaml"))


def test_what_the_rows_were_made_with_is_still_refused(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(OtherRecipeError, match=r"sample.k: 4 -> 5") as caught:
        open_run(recipe_of(tmp_path, by("{vlm: 1}"), "sample.k=5"))
    assert "checkpoints/dpo" not in str(caught.value)


def test_adaptive_rendering_made_only_the_videos_of_the_old_rule(tmp_path: Path) -> None:
    open_run(recipe_of(tmp_path, by("{vlm: 1}"), "render.strategy=adaptive"))
    with pytest.raises(OtherRecipeError, match=r"pair.margin: 0.5 -> 1.5"):
        open_run(recipe_of(tmp_path, by("{vlm: 1}"), "render.strategy=adaptive", "pair.margin=1.5"))


def test_a_curriculum_weighs_by_the_round(run: RunDir, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, by("{reward: [1, 0], vlm: [0, 1]}"))
    make_pairs(recipe, run)
    assert chosen(run)["a"] == "prompt 2"
    run.write_json(ROUND, {"round": 2})
    make_pairs(recipe, run)
    assert chosen(run)["a"] == "prompt 0"


def test_the_ledger_says_why_a_formula_gave_no_pair(run: RunDir, tmp_path: Path) -> None:
    gated = recipe_of(tmp_path, by("{reward: {above: 2.5}}", "{vlm.temporal_flickering: {above: 0.5}}"))
    make_pairs(gated, run)
    assert chosen(run) == {"a": "prompt 2"}
    entry = build_ledger(run, gated)["stages"]["pair"]
    assert entry["dropped"] == {
        f"fewer than two videos that the formula weighs: {GATE}": 1,
        "no video may be chosen: reward not above 2.5": 1,
    }
    counted = run.read_json("meta/pairs.json")["reasons"]
    assert counted[GATE] == 3
    missing = recipe_of(tmp_path, by("{vlm.colour: 1}"))
    with pytest.raises(
        LoopError, match=r"8 formula: no reward gave vlm.colour(?s:.*)what the formula asks for"
    ):
        make_pairs(missing, run)
    assert chosen(run) == {"a": "prompt 2"}, "the pairs that there were stay"


def test_the_ledger_has_how_far_the_rewards_agree(run: RunDir, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, by("{reward: 1, vlm.dynamic_degree: 1}"))
    more = [feedback(f"d{n}", k, float(k), 3.0 - k, 1.0) for n in range(5) for k in range(3)]
    run.table("feedback").append(more)
    ledger = build_ledger(run, recipe)
    [entry] = ledger["stages"]["score"]["agreement"]
    assert (entry["a"], entry["b"], entry["queries"]) == ("reward", "vlm.dynamic_degree", 8)
    assert entry["mean"] == -0.75, "-1 in seven queries, 1 in one"
    assert [line for line in alarms(ledger) if "disagree" in line], alarms(ledger)
    assert "agreement" not in build_ledger(run, load(TINY, [f"out={run.uri}"]))["stages"]["score"]
