"""What the world's policy gains is gone when the signal is wrong: a flipped reward, swapped pairs, shuffled
queries. And a reward with a hole is found out by an evaluation. Half an hour of two cores."""

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vpo_ray
from vpo_ray.evaluation.evaluate import Evaluated
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.world.make import make_world

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
Tamper = Callable[[RunDir, Recipe], None]


def proof():
    spec = importlib.util.spec_from_file_location("proof", ROOT / "benchmarks/proof.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder / "world")
    return folder


@pytest.fixture(scope="module")
def recipe(world, request) -> Callable[..., Recipe]:
    """The demo's recipe, with what it names in the folder of this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{':'.join(sys.path)}")

        def make(out: str, *sets: str) -> Recipe:
            here = world / "world"
            moved = [
                f"queries.path={here}/queries.jsonl",
                f"policy.model={here}/policy",
                f"policy.task_prompt={here}/caption.txt",
                f"sft.data={here}/sft.jsonl",
                f"judge.model={here}/judge",
                f"judge.critique_prompt={here}/judge/critique.txt",
                f"judge.refine_prompt={here}/judge/refine.txt",
                f"render.model={here}/video",
                f"render.store={world}/videos",
                f"reward.model={here}/reward",
                f"reward.checklist.file={here}/reward/checklist.yaml",
                f"evaluate.sets.held_out.path={here}/held_out.jsonl",
                "evaluate.sets.held_out.size=30",
                "evaluate.policies=[sft, dpo]",
            ]
            return vpo_ray.load_recipe(
                ROOT / "jobs/recipes/laptop.yaml", [*moved, f"out={world / out}", *sets]
            )

        yield make


@pytest.fixture(scope="module")
def honest(recipe) -> tuple[Recipe, dict[str, float]]:
    made = recipe("honest")
    vpo_ray.run(made)
    return made, truths(vpo_ray.evaluate(made))


def truths(found: Evaluated) -> dict[str, float]:
    figures = found.results["results"]["held_out"]["render"]
    return {f"{p} {m}": figures[p][m]["value"] for p in ("sft", "dpo") for m in ("truth", "truth.look")}


def tampered(recipe, honest, name: str, tamper: Tamper) -> dict[str, float]:
    made = recipe(name)
    proof().fork(honest[0], Path(made.out))
    tamper(RunDir(made.out), made)
    vpo_ray.train(made, "dpo")
    return truths(vpo_ray.evaluate(made))


def flip(run: RunDir, recipe: Recipe) -> None:
    from vpo_ray.loop.commands import run_phase

    rows = [{**row, "score": row["score"] and -row["score"]} for row in run.table("feedback").rows()]
    run.table("feedback").replace(rows)
    run_phase(recipe, "pair")


def swap(run: RunDir, recipe: Recipe) -> None:
    from vpo_ray.loop.commands import run_phase

    run_phase(recipe, "pair")
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in run.table("pairs").rows()
    ]
    run.table("pairs").replace(rows)


def shuffle(run: RunDir, recipe: Recipe) -> None:
    from vpo_ray.loop.commands import run_phase

    run_phase(recipe, "pair")
    rows = list(run.table("pairs").rows())
    others = random.Random(0).sample(rows, len(rows))
    run.table("pairs").replace([{**r, "query": o["query"]} for r, o in zip(rows, others, strict=True)])


def test_the_demo_gains(honest) -> None:
    found = honest[1]
    assert found["dpo truth"] > found["sft truth"]
    assert found["dpo truth.look"] > found["sft truth.look"]


@pytest.mark.parametrize("tamper", [flip, swap])
def test_the_gain_turns_with_the_signal(recipe, honest, tamper: Tamper) -> None:
    found = tampered(recipe, honest, tamper.__name__, tamper)
    assert found["dpo truth"] < found["sft truth"]
    assert found["dpo truth.look"] < found["sft truth.look"]


def test_queries_of_other_prompts_teach_less(recipe, honest) -> None:
    found = tampered(recipe, honest, "shuffle", shuffle)
    assert found["dpo truth"] < honest[1]["dpo truth"]


def test_a_hole_in_the_reward_is_found_out(recipe, honest) -> None:
    made = recipe("hacked", "reward.kind=hacked_reward:Hacked", "pair.text_per_query=0")
    proof().fork(honest[0], Path(made.out))
    for name in ("feedback", "made_with/score.json"):
        run = RunDir(made.out)
        run.table(name).replace([]) if "/" not in name else (Path(made.out) / name).unlink()
    vpo_ray.run(made)
    found = vpo_ray.evaluate(made)
    figures = found.results["results"]["held_out"]["render"]
    assert figures["dpo"]["reward"]["value"] > figures["sft"]["reward"]["value"]
    assert figures["dpo"]["truth"]["value"] < figures["sft"]["truth"]["value"]
    assert any("part ways" in sentence and "truth" in sentence for sentence in found.results["signs"])
