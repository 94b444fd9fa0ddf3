"""What no node of the cluster can take is told with the missing resource named, and nothing else is."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpo_ray.recipe import RecipeError, Train, load
from vpo_ray.stream import placement
from vpo_ray.stream.placement import (
    ClusterState,
    Node,
    PlacementError,
    Shape,
    pool_shapes,
    problems,
    worker_shapes,
)

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
PRESET = str(Path(__file__).parents[2] / "jobs/recipes/vpo_cogvideox_2b.yaml")
STAGES = ("sample", "judge", "render", "score")
GPU_NODE = Node({"CPU": 8, "GPU": 1, "accelerator_type:H100": 1}, {"vpo-group": "generate"})


def test_the_tiny_recipe_fits_a_laptop_and_the_presets_need_gpus() -> None:
    laptop = ClusterState([Node({"CPU": 4})])
    assert problems(pool_shapes(load(TINY), STAGES), laptop) == []
    lines = problems(pool_shapes(load(PRESET), STAGES), laptop)
    assert [line.split(":")[0] for line in lines] == [
        "sample.pool",
        "judge.pool",
        "render.pool",
        "reward.pool",
    ]
    assert all("GPU 1" in line and "no node has GPU" in line for line in lines)
    assert problems(pool_shapes(load(PRESET), STAGES), ClusterState([GPU_NODE] * 4)) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("render.pool.num_gpus=2", "no node has more GPU than 1"),
        ("render.pool.accelerator_type=A100", "no node has accelerator_type:A100"),
        ("render.pool.resources={fast_disk: 1}", "no node has fast_disk"),
        ("render.pool.labels={vpo-group: train}", "there are vpo-group=generate"),
        ("render.pool.labels={zone: a}", "there are none of these names"),
        ('render.pool.labels={vpo-group: "!generate"}', "there are vpo-group=generate"),
        ('render.pool.labels={vpo-group: "!in(serve, generate)"}', "there are vpo-group=generate"),
        ('render.pool.labels={vpo-group: "in(serve, train)"}', "there are vpo-group=generate"),
        ("render.pool.num_cpus=9", "no node has more CPU than 8"),
    ],
)
def test_the_missing_resource_is_named(override: str, told: str) -> None:
    shapes = pool_shapes(load(PRESET, [override]), STAGES)
    [line] = problems(shapes, ClusterState([GPU_NODE] * 4))
    assert line.startswith("render.pool: ")
    assert told in line


@pytest.mark.parametrize(
    "label", ["generate", "!train", "in(train, generate)", "!in(train,serve)", "!in()"], ids=str
)
def test_labels_are_read_as_ray_reads_them(label: str) -> None:
    shapes = pool_shapes(load(PRESET, [f'render.pool.labels={{vpo-group: "{label}"}}']), STAGES)
    assert problems(shapes, ClusterState([GPU_NODE] * 4)) == []


def test_replicas_that_fit_one_by_one_must_fit_together() -> None:
    [line] = problems(pool_shapes(load(PRESET), STAGES), ClusterState([GPU_NODE] * 3))
    assert "together 4 GPU, and the cluster has 3" in line
    assert "judge.pool 1" in line


def test_pieces_of_one_engine_may_lie_on_several_nodes() -> None:
    sets = ["judge.engine.tensor_parallel_size=2"]
    shapes = pool_shapes(load(PRESET, sets), ("judge",))
    assert problems(shapes, ClusterState([GPU_NODE] * 2)) == []
    assert "together 2 GPU" in problems(shapes, ClusterState([GPU_NODE]))[0]


def test_drafting_is_looked_at_and_an_endpoint_is_one_piece() -> None:
    drafts = "draft={examples: vpo_ray/data/sft.jsonl, llm: {model: m, pool: {num_gpus: 2}}}"
    [line] = problems(pool_shapes(load(PRESET, [drafts]), ("draft",)), ClusterState([GPU_NODE]))
    assert line.startswith("draft.llm.pool: a replica needs CPU 1, GPU 2")
    by_judge = pool_shapes(load(PRESET, ["draft={examples: vpo_ray/data/sft.jsonl}"]), ("draft",))
    assert by_judge[0].where == "judge.pool"
    remote = ["judge.backend=openai", "judge.engine.tensor_parallel_size=4", "judge.pool={num_cpus: 0.5}"]
    [shape] = pool_shapes(load(PRESET, remote), ("judge",))
    assert (shape.resources, shape.count) == ({"CPU": 0.5}, 1)
    assert problems([shape], ClusterState([Node({"CPU": 1})])) == []


def test_no_node_with_everything_at_once() -> None:
    shape = Shape("x", {"GPU": 1, "disk": 1})
    assert "all of these at once" in problems([shape], ClusterState([Node({"GPU": 1}), Node({"disk": 1})]))[0]


def test_training_workers_start_together() -> None:
    phase = Train(epochs=1, lr=1e-5, global_batch=8, workers=8)
    shapes = worker_shapes("dpo", phase)
    assert (
        "dpo.workers 8: together 8 GPU, and the cluster has 4"
        in problems(shapes, ClusterState([GPU_NODE] * 4))[0]
    )
    assert problems(shapes, ClusterState([Node({"GPU": 8})])) == []
    cpu = worker_shapes("dpo", phase.model_copy(update={"use_gpu": False, "workers": 2}))
    assert problems(cpu, ClusterState([Node({"CPU": 2})])) == []
    assert "together 2 CPU" in problems(cpu, ClusterState([Node({"CPU": 1})]))[0]


def test_an_autoscaler_may_bring_what_is_not_there_unless_it_says_no() -> None:
    shapes = pool_shapes(load(PRESET), STAGES)
    assert problems(shapes, ClusterState([Node({})], autoscaled=True)) == []
    refused = ClusterState([Node({})], autoscaled=True, infeasible=[{"CPU": 1.0, "GPU": 1.0}])
    assert "no node type of the autoscaler" in problems(shapes, refused)[0]
    other = ClusterState([Node({})], autoscaled=True, infeasible=[{"CPU": 1.0, "TPU": 4.0}])
    assert problems(shapes, other) == []
    # Somebody else's request with other labels.
    assert problems(shapes, ClusterState([GPU_NODE] * 4, True, [{"CPU": 1.0, "GPU": 1.0}])) == []


def test_a_monitor_that_only_looks_on_is_no_autoscaler() -> None:
    alone, grouped = [Node({"CPU": 4})], [Node({"CPU": 4}, {"ray.io/node-group": "generate"})]
    looks_on = json.dumps({"autoscaler_report": {"active_nodes": {"node_ab12": 1}}}).encode()
    first = json.dumps({"autoscaler_report": {"active_nodes": {"head": 1}}}).encode()
    assert not placement._autoscaled(alone, 0, None)
    assert not placement._autoscaled(alone, 5, looks_on)
    assert placement._autoscaled(alone, 0, first)
    assert placement._autoscaled(grouped, 5, None)
    assert not placement._autoscaled(grouped, 0, None), "KubeRay without its autoscaler"


@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=6), st.integers(1, 4))
def test_what_one_node_holds_is_never_a_problem(amounts: list[float], nodes: int) -> None:
    shapes = [Shape(f"s{i}", {"CPU": amount}) for i, amount in enumerate(amounts)]
    assert problems(shapes, ClusterState([Node({"CPU": sum(amounts) + 1e-6})] * nodes)) == []


def test_labels_where_ray_takes_none_are_refused() -> None:
    labels = "labels={vpo-group: generate}"
    assert load(PRESET, [f"judge.pool.{labels}"]).judge.pool.labels == {"vpo-group": "generate"}
    with pytest.raises(RecipeError, match=r"judge\.pool\.labels.*pool\.resources"):
        load(PRESET, [f"judge.pool.{labels}", "judge.engine.tensor_parallel_size=2"])
    with pytest.raises(RecipeError, match=r"serve\.pool\.resources"):
        load(PRESET, [f"serve.pool.{labels}"])
    assert load(PRESET, [f"render.pool.{labels}"]).fingerprint() == load(PRESET).fingerprint()


def test_a_lost_node_ends_the_work_and_one_that_comes_back_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster here is a list that changes; asking a real one is tested with Ray below."""
    shapes = [Shape("render.pool", {"GPU": 1})]
    states = [ClusterState([GPU_NODE]), ClusterState([]), ClusterState([GPU_NODE])]
    monkeypatch.setattr(placement, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(placement, "cluster_state", lambda: states.pop(0) if len(states) > 1 else states[0])
    before = signal.getsignal(signal.SIGUSR1)
    with placement.watched(shapes, timeout_s=0.2):
        threading.Event().wait(0.5)
    states[:] = [ClusterState([])]
    began = time.monotonic()
    with pytest.raises(PlacementError, match=r"render\.pool.*GPU 1.*\n.*Its nodes: none"):
        with placement.watched(shapes, timeout_s=0.2):
            threading.Event().wait(30)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.ray
def test_a_run_that_no_node_can_take_fails_in_seconds(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
) -> None:
    from vpo_ray.records import query_id
    from vpo_ray.stages.sample import candidates
    from vpo_ray.storage.run_dir import RunDir
    from vpo_ray.stream.pipeline import Models, generate
    from vpo_ray.train import PhaseSpec, train

    sets = [f"out={tmp_path / 'run'}", "limits.placement_timeout_s=1"]
    recipe = load(TINY, [*sets, "render.pool.resources.quantum_disk=1"])
    run = RunDir(recipe.out)
    query = {"query_id": query_id("a cat"), "query": "a cat", "source": "t", "split": "dpo", "unsafe": False}
    run.table("queries").append([query])
    run.table("verdicts").append([next(iter(candidates(query, recipe.sample, "p", recipe.seed)))])
    began = time.monotonic()
    with pytest.raises(
        PlacementError, match=r"render\.pool.*quantum_disk 1.*no node has quantum_disk"
    ) as error:
        generate(recipe, run, Models("nowhere", "p"), stages=("render",))
    assert "1 x (CPU 4)" in str(error.value)
    assert time.monotonic() - began < 30

    dpo = load(TINY, [*sets, "dpo.workers=9"]).dpo
    rows = [{"pair_id": "1", "query_id": "1", "query": "a cat", "chosen": "a good cat", "rejected": "a dog"}]
    assert dpo is not None
    spec = PhaseSpec(
        phase="dpo",
        settings=dpo,
        model=str(tiny_models / "policy"),
        task_prompt="Write: {query}",
        out=str(tmp_path / "policy"),
        run_uri=str(tmp_path / "run"),
        seed=0,
        fingerprint="f",
        placement_timeout_s=0.5,
    )
    with pytest.raises(PlacementError, match=r"dpo\.workers 4\.5: together 4\.5 CPU, and the cluster has 4"):
        train(spec, rows)
