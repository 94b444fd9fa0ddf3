"""A cluster of several kinds of nodes: every stage and every training worker runs on the kind that its
pool names. Custom resources stand for the kinds of GPUs.

Where something ran is read from the table of actors that Ray's head keeps.
"""

import subprocess
from pathlib import Path

import pytest
from clusters import simulated, vpo

from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id
from vpo_ray.stages.sample import candidates
from vpo_ray.storage import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = "jobs/recipes/tiny.yaml"
KINDS = {
    "samplers": {"num_cpus": 2, "resources": {"sampler": 1}},
    "renderers": {"num_cpus": 2, "resources": {"renderer": 1}},
}
POOLS = [
    "sample.pool.resources.sampler=0.5",
    "judge.pool.resources.sampler=0.5",
    "render.pool.resources.renderer=0.5",
    "reward.pool.resources.renderer=0.5",
]


def options(sets: list[str]) -> list[str]:
    return [part for item in sets for part in ("--set", item)]


def recipe_of(tiny_sets: list[str], folder: Path, *more: str) -> tuple[Recipe, list[str]]:
    """The recipe and its overrides as arguments of `vpo`."""
    queries = folder / "queries.txt"
    animals = ["cat", "dog", "owl", "fox", "hen", "eel", "bat", "elk", "ram", "ant"]
    queries.write_text("\n".join(f"a {animal} in the rain" for animal in animals))
    sets = [f"out={folder / 'run'}", f"queries.path={queries}", "sft=null", *POOLS, *more]
    return load(TINY, [*tiny_sets[1::2], *sets]), [*tiny_sets, *options(sets)]


def verdicts(recipe: Recipe, count: int) -> list[Row]:
    """Candidates as judging leaves them."""
    queries = [f"a cat in the rain, take {n}" for n in range(count)]
    rows = [
        {"query_id": query_id(q), "query": q, "source": "t", "split": "dpo", "unsafe": False} for q in queries
    ]
    first = [next(iter(candidates(row, recipe.sample, "p", recipe.seed))) for row in rows]
    return [{**row, "prompt": row["query"], "verdict": "aligned"} for row in first]


def done(told: subprocess.CompletedProcess[str]) -> None:
    assert told.returncode == 0, told.stderr[-6000:]


def test_sampling_and_rendering_run_on_their_own_kinds(
    tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, sets = recipe_of(tiny_sets, tmp_path, "queries.splits={dpo: 1}", "queries.limit=2", "sample.k=2")
    run = RunDir(recipe.out)
    with simulated(monkeypatch, **KINDS) as cluster:
        done(vpo(cluster.address, "curate", TINY, *sets))
        done(vpo(cluster.address, "sample", TINY, *sets))
        assert cluster.ran_on("VllmStageActor") == {"samplers"}
        assert cluster.ran_on("StageActor") == {"samplers"}, "nothing rendered yet"
        run.table("verdicts").append(verdicts(recipe, 2))
        done(vpo(cluster.address, "render", TINY, *sets))
        assert cluster.ran_on("(StageActor)") == {"renderers"}
        assert cluster.ran_on("VllmStageActor") == {"samplers"}
    assert run.table("candidates").count() == 4
    assert all(row["video_key"] for row in run.table("renders").rows())
