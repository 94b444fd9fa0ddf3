"""Rounds: real training on the pairs of each round; its candidates are written by the test.

What a finished round leaves makes the pipeline do nothing, so no engine but training runs here.
"""

import time
from pathlib import Path

import pytest

from vpo_ray.loop import phases
from vpo_ray.loop.opening import open_run
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.loop.phases import curate_queries
from vpo_ray.loop.policies import LoopError, Start, learnt_id, policy_id
from vpo_ray.loop.rounds import run_rounds
from vpo_ray.recipe import Recipe, load, parse
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def recipe_of(tiny_sets: list[str], folder: Path, **changes: object) -> Recipe:
    queries = folder / "queries.txt"
    queries.write_text(
        "\n".join(f"a {animal} in the rain" for animal in ("cat", "dog", "owl", "fox")), "utf-8"
    )
    values = {
        "out": folder / "run",
        "queries.path": queries,
        "queries.splits": "{dpo: 1}",
        "sft": "null",
        "sample.k": 2,
        "dpo.workers": 1,
        "dpo.zero_stage": 0,
        "dpo.lr": 1e-3,
        "dpo.schedule": "constant",
        "dpo.warmup_ratio": 0,
        "dpo.global_batch": 2,
        **changes,
    }
    sets = [f"{key}={value}" for key, value in values.items()]
    return load(ROOT / "jobs/recipes/tiny.yaml", [*tiny_sets[1::2], *sets])


def write_feedback(recipe: Recipe, run: RunDir, identity: str, text: str) -> None:
    """Two scored candidates for every query, as the policy `identity` would have left them."""
    curate_queries(recipe, run)
    rows = []
    for query in run.table("queries").rows():
        for row in candidates(query, recipe.sample, identity, recipe.seed):
            better = row["k"] == 0
            made = {
                "prompt": f"{text} {row['query']}" + " in soft light" * better,
                "verdict": "aligned",
                "score": 1.0 + better,
                "answers": [],
                "dimensions": [],
            }
            rows.append({**row, **made})
    run.table("feedback").append(rows)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.parametrize("reference", ["updated", "kept"])
def test_a_round_starts_from_the_policy_of_the_round_before(
    ray_cluster: None, tiny_sets: list[str], tmp_path: Path, reference: str
) -> None:
    recipe = recipe_of(tiny_sets, tmp_path, **{"dpo.reference": reference})
    first = open_run(recipe)
    write_feedback(recipe, first, policy_id(recipe, first), "First:")
    make_pairs(recipe, first)
    identity = learnt_id(recipe, first, Start("", policy_id(recipe, first)))
    second = RunDir(first.at("rounds/2"))
    write_feedback(recipe, second, identity, "Second:")
    for run in (first, second):  # else an engine would be started to serve it
        run.write_json("example.json", {"query": "q", "sft": "a", "dpo": "b"})

    run_rounds(recipe, 1)
    trained = (tmp_path / "run/checkpoints/dpo/model.safetensors").stat().st_mtime_ns
    assert not second.exists("recipe.yaml")
    assert run_rounds(recipe, 2).uri == second.uri
    assert (tmp_path / "run/checkpoints/dpo/model.safetensors").stat().st_mtime_ns == trained

    facts = second.read_json("checkpoints/dpo/vpo.json")
    assert facts["base_model"] == first.at("checkpoints/dpo")
    assert all(row["chosen"].startswith("Second:") for row in second.table("pairs").rows())
    assert second.read_json("round.json")["start"]["identity"] == identity
    # A policy that is its own reference begins at log 2; round 1 has moved it from the first one.
    start = second.metrics("dpo")[0]["loss"]
    assert first.metrics("dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    if reference == "updated":
        assert start == pytest.approx(0.693147, abs=1e-4)
    else:
        assert abs(start - 0.693147) > 1e-3
    assert (second.read_json("ledger.json"), second.exists("report/index.html")) != ({}, False)

    again = tmp_path / "run/rounds/2/checkpoints/dpo/model.safetensors"
    before = again.stat().st_mtime_ns
    run_rounds(recipe, 2)
    assert again.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_round_is_sampled_and_rendered_while_the_round_before_trains(
    ray_cluster: None, tiny_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rl = {"epochs": 1, "lr": 1e-3, "warmup_ratio": 0, "workers": 1, "zero_stage": 0, "global_batch": 2}
    rl |= {"dtype": "float32", "overlap": True, "use_gpu": False, "resources_per_worker": {"CPU": 0.5}}
    # A measure of pixels: answers of a reward with random weights may all be alike.
    reward = {"kind": "vbench", "dimensions": ["temporal_flickering"], "pool": {"num_cpus": 0.1}}
    tree = recipe_of(tiny_sets, tmp_path).dump() | {"dpo": None, "rl": rl, "evaluate": None, "reward": reward}
    recipe = parse({key: value for key, value in tree.items() if key != "pair"}, "the test's")
    first, second = RunDir(recipe.out), RunDir(f"{recipe.out}/rounds/2")
    third = RunDir(f"{recipe.out}/rounds/3")
    began: dict[str, list[str]] = {}
    train = phases.train_rl

    def train_rl(recipe: Recipe, run: RunDir, start: Start) -> str:
        """Training that ends when the work beside it has sampled: were it not beside it, it never would."""
        following = {first.uri: second, second.uri: third}.get(run.uri)
        if following is not None:
            deadline = time.monotonic() + 300
            while not following.table("feedback").keys() and time.monotonic() < deadline:
                time.sleep(0.2)
            began[run.uri] = sorted(following.table("feedback").keys())
        return train(recipe, run, start)

    monkeypatch.setattr(phases, "train_rl", train_rl)
    last = run_rounds(recipe, 3)
    assert last.uri == third.uri
    assert all(began[run.uri] for run in (first, second))
    starts = [run.read_json("round.json")["start"] for run in (second, third)]
    assert [start["policy"] for start in starts] == [run.at("checkpoints/rl") for run in (first, second)]
    assert [start["sampler"] for start in starts] == [recipe.policy.model, first.at("checkpoints/rl")]
    prompts = [
        {row["candidate_id"] for row in run.table("candidates").rows()} for run in (first, second, third)
    ]
    assert not prompts[0] & prompts[1], "other candidates of the same policy"
    for run in (second, third):
        assert {row["policy"] for row in run.table("candidates").rows()} == {
            run.read_json("round.json")["start"]["sampler_identity"]
        }
        # The policy that is trained is not the one that sampled: ratios differ from 1 from the first step on.
        assert run.metrics("rl")[0]["ratio"] != 1.0
    assert first.metrics("rl")[0]["ratio"] == pytest.approx(1.0, abs=1e-4)

    before = third.read_json("checkpoints/rl/vpo.json")
    run_rounds(recipe, 3)
    assert third.read_json("checkpoints/rl/vpo.json") == before


def test_rounds_need_a_dpo_section_that_leaves_a_whole_model(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="needs a dpo or rl section"):
        run_rounds(recipe_of([], tmp_path).model_copy(update={"dpo": None}), 2)
    with pytest.raises(LoopError, match=r"dpo\.lora\.merge true"):
        run_rounds(recipe_of([], tmp_path, **{"dpo.lora": "{merge: false}"}), 2)
