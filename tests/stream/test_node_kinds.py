"""A cluster of several kinds of nodes: every stage and every training worker runs on the kind that its
pool names. Custom resources stand for the kinds of GPUs.

Where something ran is read from the table of actors that Ray's head keeps.
"""

import subprocess
from pathlib import Path

import pytest
from clusters import Simulated, python, simulated, vpo

from vpo_ray.loop.ledger import reconcile
from vpo_ray.loop.policies import policy_id
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Row, query_id
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
KINDS = {
    "samplers": {"num_cpus": 2, "resources": {"sampler": 1}},
    "renderers": {"num_cpus": 2, "resources": {"renderer": 1}},
    "trainers": {"num_cpus": 2, "resources": {"trainer": 2}},
}
WHERE = {"sample": "samplers", "judge": "samplers", "render": "renderers", "score": "renderers"}
POOLS = [
    "sample.pool.resources.sampler=0.5",
    "judge.pool.resources.sampler=0.5",
    "render.pool.resources.renderer=0.5",
    "reward.pool.resources.renderer=0.5",
    "dpo.resources_per_worker.trainer=1",
]


def options(sets: list[str]) -> list[str]:
    return [part for item in sets for part in ("--set", item)]


def recipe_of(tiny_sets: list[str], folder: Path, *more: str) -> tuple[Recipe, list[str]]:
    """The recipe and its overrides as arguments of `vpo`."""
    queries = folder / "queries.txt"
    animals = ["cat", "dog", "owl", "fox", "hen", "eel", "bat", "elk", "ram", "ant"]
    queries.write_text("\n".join(f"a {animal} in the rain" for animal in animals), "utf-8")
    sets = [f"out={folder / 'run'}", f"queries.path={queries}", "sft=null", *POOLS, *more]
    return load(TINY, [*tiny_sets[1::2], *sets]), [*tiny_sets, *options(sets)]


def verdicts(recipe: Recipe, count: int) -> list[Row]:
    """Candidates of the recipe's policy, as judging leaves them."""
    policy = policy_id(recipe, RunDir(recipe.out))
    queries = [f"a cat in the rain, take {n}" for n in range(count)]
    rows = [
        {"query_id": query_id(q), "query": q, "source": "t", "split": "dpo", "unsafe": False} for q in queries
    ]
    first = [next(iter(candidates(row, recipe.sample, policy, recipe.seed))) for row in rows]
    return [{**row, "prompt": row["query"], "verdict": "aligned"} for row in first]


def done(told: subprocess.CompletedProcess[str]) -> None:
    assert told.returncode == 0, told.stderr[-6000:]


def test_sampling_and_rendering_run_on_their_own_kinds(
    tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {name: KINDS[name] for name in ("samplers", "renderers")}
    recipe, sets = recipe_of(tiny_sets, tmp_path, "queries.splits={dpo: 1}", "queries.limit=2", "sample.k=2")
    run = RunDir(recipe.out)
    with simulated(monkeypatch, **nodes) as cluster:
        done(vpo(cluster.address, "curate", TINY, *sets))
        done(vpo(cluster.address, "sample", TINY, *sets))
        assert cluster.ran_on("(sample)") == {"samplers"}
        assert cluster.ran_on("(render)") == set(), "nothing rendered yet"
        run.table("verdicts").append(verdicts(recipe, 2))
        done(vpo(cluster.address, "render", TINY, *sets))
        assert cluster.ran_on("(render)") == {"renderers"}
        assert cluster.ran_on("(sample)") == {"samplers"}
    assert run.table("candidates").count() == 4
    assert all(row["video_key"] for row in run.table("renders").rows())


@pytest.mark.slow
def test_the_loop_runs_on_three_kinds_of_nodes(
    tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job hands on to the next: generation, training, evaluation on queries that neither saw."""
    policies = "evaluate.policies={query: {kind: query}, dpo: {kind: dpo}}"
    recipe, sets = recipe_of(tiny_sets, tmp_path, "queries.splits={dpo: 0.7, eval: 0.3}", policies)
    run = RunDir(recipe.out)
    with simulated(monkeypatch, **KINDS) as cluster:
        job(cluster, "generate", sets)
        for stage, kind in WHERE.items():
            assert cluster.ran_on(f"({stage})") == {kind}
        assert cluster.ran_on("RayTrainWorker") == set()
        feedback = snapshot(run, "feedback")
        job(cluster, "train", sets)
        assert cluster.ran_on("RayTrainWorker") == {"trainers"}
        assert run.exists("checkpoints/dpo/vpo.json")
        job(cluster, "evaluate", sets)
        for stage, kind in WHERE.items():
            assert cluster.ran_on(f"({stage})") == {kind}
        # Done: the same jobs again change nothing, and say so with status 0.
        trained = (Path(run.path) / "checkpoints/dpo/vpo.json").stat().st_mtime_ns
        latest = run.read_json("evaluation.json")
        for name in ("generate", "train", "evaluate"):
            job(cluster, name, sets)
    assert snapshot(run, "feedback") == feedback
    assert (Path(run.path) / "checkpoints/dpo/vpo.json").stat().st_mtime_ns == trained
    assert run.read_json("evaluation.json") == latest
    result = run.read_json(latest["results"])
    held_out = {row["query_id"] for row in run.table("queries").rows() if row["split"] == "eval"}
    assert result["sets"]["eval"]["n"] == len(held_out) > 0
    assert not held_out & {row["query_id"] for row in run.table("feedback").rows()}
    for figures in result["results"]["eval"]["render"].values():
        shares = [figure["value"] for name, figure in figures.items() if name.startswith("verdict.")]
        assert sum(shares) == pytest.approx(1)
    assert reconcile(run.read_json("ledger.json")) == []


def job(cluster: Simulated, name: str, sets: list[str]) -> None:
    done(python(cluster.address, f"jobs/{name}.py", "--recipe", TINY, *sets))


def snapshot(run: RunDir, table: str) -> list[str]:
    return sorted(run.table(table).parts())
