"""The stream itself: every row arrives once, whatever dies, fails or was done before.

The stages here are small functions in place of models; engines have tests of their own, and
test_loop.py runs the whole with real ones.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import pytest

from vpo_ray.files.folder import StorageError
from vpo_ray.loop.ledger import build_ledger, reconcile
from vpo_ray.loop.pairing import make_pairs
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import Shard, query_id
from vpo_ray.stages import spec
from vpo_ray.stages.adaptive import ENOUGH
from vpo_ray.stages.spec import StageSpec
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.storage.videos import VideoStore
from vpo_ray.stream import pipeline
from vpo_ray.stream.pipeline import GenerationError, Models, generate

pytestmark = pytest.mark.ray

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
MODELS = Models("nowhere", "test-policy")
POOLS = [f"{key}.pool={{size: 1, num_cpus: 0.1}}" for key in ("sample", "judge", "render", "reward")]
STAGES = spec.names("generation")
COUNT = 6  # queries of a run, four candidates each


class Small:
    """A stage that fills in the columns its name asks for; some queries make it fail."""

    def __init__(self, name: str, faults: str) -> None:
        self.name, self.faults = name, Path(faults)
        loads = self.faults / f"load-{name}"
        if loads.exists() and (left := int(loads.read_text("utf-8"))):
            loads.write_text(str(left - 1), "utf-8")
            raise RuntimeError("the engine died while it loaded")

    def wants(self, row):
        if row["error"] is not None:
            return False
        return {
            "sample": row["prompt"] is None,
            "judge": row["verdict"] is None,
            "render": row["verdict"] == "aligned" and row["video_key"] is None,
            "score": row["video_key"] is not None and row["score"] is None,
        }[self.name]

    def __call__(self, rows):
        return [self._one(dict(row)) for row in rows]

    def _one(self, row):
        fault = self.faults / f"{self.name}-{row['query'].split()[0]}-{row['k']}"
        if fault.exists():
            if fault.read_text("utf-8") == "kill":
                os._exit(1)
            raise (StorageError if fault.read_text("utf-8") == "disk full" else ValueError)(
                fault.read_text("utf-8")
            )
        if self.name == "sample":
            return row | {"prompt": f"{row['query']} shown well, take {row['k']}", "completion_tokens": 5}
        if self.name == "judge":
            return row | {"verdict": "imprecise" if row["k"] == 3 else "aligned", "critique": "so"}
        if self.name == "render":
            return row | {"video_key": row["candidate_id"], "video_uri": "x", "frames": 9}
        flat = (self.faults / f"flat-{row['query'].split()[0]}").exists()
        return row | {"score": 1.0 if flat else float(row["k"]), "answers": [], "dimensions": []}


def small(name: str, faults: Path) -> StageSpec:
    """The entry of a stage of the package, whose replicas are Small."""
    make = lambda making: partial(Small, name, str(faults))  # noqa: E731
    return replace(spec.stage(name), runs_on="batch", calls=lambda recipe: 1, make=make)


def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, no stage can be made."""
    for name in STAGES:
        monkeypatch.setitem(spec.STAGES, name, replace(spec.stage(name), make=None))


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Path:
    """A folder of faults: a file `STAGE-QUERY-K` makes that row fail with its text, or kill,
    `flat-QUERY` gives all its videos one score, and `load-STAGE` says how often loading fails."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path / "faults"
    folder.mkdir()
    for name in STAGES:
        monkeypatch.setitem(spec.STAGES, name, small(name, folder))
    return folder


def recipe_for(tmp_path: Path, more: Sequence[str] = (), **limits) -> Recipe:
    overrides = [
        *POOLS,
        *more,
        f"out={tmp_path / 'run'}",
        "sample.engine.batch_size=8",
        "judge.engine.batch_size=8",
    ]
    overrides += [f"limits.{key}={value}" for key, value in limits.items()]
    return load(TINY, overrides)


def run_of(recipe: Recipe, count: int = COUNT) -> RunDir:
    run = RunDir(recipe.out)
    queries = [f"q{i} of many" for i in range(count)] + ["held out"]
    rows = [
        {"query_id": query_id(q), "query": q, "source": "t", "split": "dpo" if q[0] == "q" else "eval"}
        for q in queries
    ]
    run.table("queries").append(rows)
    return run


def outputs(run: RunDir) -> dict[tuple, tuple]:
    return {
        (row["query"], row["k"]): (row["prompt"], row["verdict"], row["score"], row["error_stage"])
        for row in run.table("feedback").rows()
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all", "adaptive"])
def test_shards_and_then_the_whole_make_what_one_driver_makes(
    tmp_path: Path, faults: Path, strategy: str
) -> None:
    (faults / "score-q2-1").write_text("the frames are black", "utf-8")
    recipe = recipe_for(tmp_path, [f"render.strategy={strategy}"])
    run = run_of(recipe)
    for index in (2, 3):
        part = RunDir(recipe.out, Shard(index, 3))
        generate(recipe, part, MODELS)
        mine = part.table("queries").keys(pc.field("split") == "dpo")
        assert part.table("feedback").count() == 4 * len(mine) > 0
        assert part.table("verdicts").count() == part.table("feedback").count()
    shards = outputs(run)
    assert len(shards) < 4 * COUNT, "nobody took the first shard"
    assert len(run.table("feedback").parts()) > 1, "parts are merged by the driver of the whole run"
    generate(recipe, run, MODELS)
    assert [p for p in reconcile(build_ledger(run, recipe)) if not p.startswith("pair")] == []

    whole = recipe_for(tmp_path / "whole", [f"render.strategy={strategy}"])
    generate(whole, run_of(whole), MODELS)
    assert outputs(run) == outputs(RunDir(whole.out))
    assert shards.items() <= outputs(run).items()


def test_every_candidate_ends_in_feedback_once(
    tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path)
    run = run_of(recipe)
    counts = generate(recipe, run, MODELS)
    rows = [row for batch in run.table("feedback").batches() for row in batch.to_pylist()]
    assert Counter((r["query"], r["k"]) for r in rows) == Counter(
        {(f"q{i} of many", k): 1 for i in range(COUNT) for k in range(4)}
    )
    assert {r["score"] for r in rows if r["k"] < 3} == {0.0, 1.0, 2.0}
    assert all(r["score"] is None and r["verdict"] == "imprecise" for r in rows if r["k"] == 3)
    assert all(r["seconds"]["render"] is not None for r in rows if r["k"] < 3)
    assert counts["render"] == {"done": 3 * COUNT, "errors": 0, "passed": COUNT, "warm_up_s": 0}
    assert [len(run.table(name).parts()) for name in ("renders", "feedback")] == [1, 1], "parts are merged"
    assert [p for p in reconcile(build_ledger(run, recipe)) if not p.startswith("pair")] == []

    # A second run starts no pool: nothing is left to do.
    before = run.table("feedback").parts()
    no_pools(monkeypatch)
    assert sum(count["done"] for count in generate(recipe, run, MODELS).values()) == 0
    assert run.table("feedback").parts() == before


@pytest.mark.slow
def test_stage_by_stage_gives_what_one_stream_gives(tmp_path: Path, faults: Path) -> None:
    whole = recipe_for(tmp_path / "a")
    generate(whole, run_of(whole), MODELS)
    steps = recipe_for(tmp_path / "b")
    run = run_of(steps)
    for stage in STAGES:
        generate(steps, run, MODELS, [stage])
    assert outputs(run) == outputs(RunDir(whole.out))


def test_a_run_goes_on_behind_the_last_table_that_has_a_row(tmp_path: Path, faults: Path) -> None:
    recipe = recipe_for(tmp_path)
    run = run_of(recipe)
    generate(recipe, run, MODELS)
    complete = outputs(run)
    for name, share in (("feedback", 1), ("renders", 2), ("verdicts", 3)):
        rows = list(run.table(name).rows())
        run.table(name).replace(rows[len(rows) // share :], rows_per_part=4)
    judged = run.table("verdicts").count()
    # Sampling has no row left, so that nobody asks where its replicas would go.
    without = recipe_for(tmp_path, ["sample.pool.resources={nowhere: 1}"])
    counts = generate(without, run, MODELS)
    assert outputs(run) == complete
    assert counts["sample"]["done"] == 0, "no candidate is sampled twice"
    assert counts["judge"]["done"] <= 4 * COUNT - judged, "none is judged twice"
    assert counts["score"]["done"] + counts["score"]["passed"] == 4 * COUNT


def test_a_bad_row_keeps_its_error_and_harms_no_neighbour(tmp_path: Path, faults: Path) -> None:
    (faults / "judge-q3-1").write_text("no verdict", "utf-8")
    (faults / "render-q4-0").write_text("black frames", "utf-8")
    recipe = recipe_for(tmp_path)
    run = run_of(recipe)
    generate(recipe, run, MODELS)
    errors = {
        (r["query"], r["k"]): (r["error_stage"], r["error"])
        for r in run.table("feedback").rows()
        if r["error"]
    }
    assert errors[("q4 of many", 0)] == ("render", "ValueError: black frames")
    # The judge's batch fails as one here; real stages catch their rows' errors one by one.
    assert errors[("q3 of many", 1)][0] == "judge"
    assert len(outputs(run)) == 4 * COUNT
    problems = reconcile(build_ledger(run, recipe))
    assert [p for p in problems if not p.startswith("pair")] == []

    for fault in faults.iterdir():
        fault.unlink()
    counts = generate(recipe, run, MODELS, retry_errors=True)
    assert counts["sample"]["done"] == 0
    assert all(row["error"] is None for row in run.table("feedback").rows())


@pytest.mark.slow
def test_a_video_that_is_gone_when_it_is_scored_is_rendered_again(tmp_path: Path, faults: Path) -> None:
    for fault in ("score-q1-0", "score-q2-1"):
        (faults / fault).write_text("other bytes than were written", "utf-8")
    recipe = recipe_for(tmp_path)
    run = run_of(recipe, 4)
    generate(recipe, run, MODELS)
    lost, there = ((r["query"], r["k"]) for r in run.table("feedback").rows() if r["error"])
    # What is in the store is scored again only.
    kept = next(r["video_key"] for r in run.table("feedback").rows() if (r["query"], r["k"]) == there)
    VideoStore(run.at("videos")).write(kept, b"an mp4", {})
    for fault in faults.iterdir():
        fault.unlink()
    counts = generate(recipe, run, MODELS, retry_errors=True)
    assert {name: n["done"] for name, n in counts.items()} == {
        "sample": 0,
        "judge": 0,
        "render": 1,
        "score": 2,
    }
    assert all(row["error"] is None for row in run.table("feedback").rows())
    assert run.table("feedback").count() == 16
    assert lost != there


def test_a_row_that_kills_its_process_is_given_up_alone(tmp_path: Path, faults: Path) -> None:
    (faults / "judge-q5-2").write_text("kill", "utf-8")
    recipe = recipe_for(tmp_path)
    run = run_of(recipe, 6)
    generate(recipe, run, MODELS)
    errors = {(r["query"], r["k"]): r for r in run.table("feedback").rows() if r["error"]}
    assert list(errors) == [("q5 of many", 2)]
    assert errors[("q5 of many", 2)]["error_stage"] == "judge"
    assert "died under this row" in errors[("q5 of many", 2)]["error"]
    assert len(outputs(run)) == 24


@pytest.mark.slow
def test_a_pass_in_which_a_node_was_lost_gives_up_no_row(
    tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = faults / "sample-q5-2"
    fault.write_text("kill", "utf-8")
    up = [{"head", "spot"}, {"head"}]

    def nodes() -> set[str]:
        if len(up) == 1:  # the end of the first pass
            fault.unlink(missing_ok=True)
        return up.pop(0) if up else {"head"}

    monkeypatch.setattr(pipeline, "_nodes", nodes)
    recipe = recipe_for(tmp_path, tries=1)
    run = run_of(recipe, 6)
    generate(recipe, run, MODELS, ["sample"])
    rows = list(run.table("candidates").rows())
    assert len(rows) == 24
    assert all(row["error"] is None for row in rows)


def test_a_replica_that_is_lost_while_it_loads_is_started_again(tmp_path: Path, faults: Path) -> None:
    loads = faults / "load-sample"
    loads.write_text("2", "utf-8")
    recipe = recipe_for(tmp_path)
    run = run_of(recipe, 4)
    generate(recipe, run, MODELS, ["sample"])
    assert run.table("candidates").count() == 16

    loads.write_text("100", "utf-8")
    recipe = recipe_for(tmp_path / "broken")
    with pytest.raises(GenerationError, match=r"a replica failed to start.*the engine died while it loaded"):
        generate(recipe, run_of(recipe, 4), MODELS, ["sample"])
    assert int(loads.read_text("utf-8")) == 97


def test_a_run_that_mostly_fails_is_stopped(tmp_path: Path, faults: Path) -> None:
    for i in range(COUNT):
        for k in range(4):
            (faults / f"sample-q{i}-{k}").write_text("the model is upside down", "utf-8")
    recipe = recipe_for(tmp_path, min_rows=8)
    with pytest.raises(GenerationError, match=r"upside down.*--retry-errors"):
        generate(recipe, run_of(recipe), MODELS)


def test_storage_that_fails_stops_the_run_and_makes_no_error_rows(tmp_path: Path, faults: Path) -> None:
    (faults / "render-q2-1").write_text("disk full", "utf-8")
    recipe = recipe_for(tmp_path)
    run = run_of(recipe)
    with pytest.raises(GenerationError, match="disk full"):
        generate(recipe, run, MODELS)
    assert all(row["error"] is None for row in run.table("feedback").rows())
    (faults / "render-q2-1").unlink()
    generate(recipe, run, MODELS)
    assert len(outputs(run)) == 4 * COUNT


ADAPTIVE = ["render.strategy=adaptive"]


def adaptive_run(tmp_path: Path, faults: Path, count: int = 8) -> tuple[Recipe, RunDir]:
    """A run whose odd queries have no pair; k=3 is never aligned, and any two scores make a pair."""
    for i in range(1, count, 2):
        (faults / f"flat-q{i}").touch()
    recipe = recipe_for(tmp_path, ADAPTIVE)
    return recipe, run_of(recipe, count)


@pytest.mark.slow
def test_adaptive_rendering_makes_no_more_videos_than_the_pairs_take(
    tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = adaptive_run(tmp_path, faults)
    counts = generate(recipe, run, MODELS)
    assert counts["render"]["done"] == 4 * 2 + 4 * 3
    rows = list(run.table("feedback").rows())
    assert len(rows) == 8 * 4
    assert {(r["query"], r["k"]) for r in rows if r["skipped"]} == {
        (f"q{i} of many", 2) for i in (0, 2, 4, 6)
    }
    make_pairs(recipe, run)
    ledger = build_ledger(run, recipe)
    assert reconcile(ledger) == []
    assert ledger["stages"]["render"]["skipped"] == {"not aligned: imprecise": 8, ENOUGH: 4}

    whole = recipe_for(tmp_path / "all")
    other = run_of(whole, 8)
    assert generate(whole, other, MODELS)["render"]["done"] == 8 * 3
    make_pairs(whole, other)
    paired = [{row["query_id"] for row in r.table("pairs").rows()} for r in (run, other)]
    assert paired[0] == paired[1]
    assert len(paired[0]) == 4
    # Both runs tell what either strategy takes.
    told = {"all": {"videos": 24, "per_video_pair": 6.0}, "adaptive": {"videos": 20, "per_video_pair": 5.0}}
    assert ledger["stages"]["pair"]["videos"] == told
    assert build_ledger(other, whole)["stages"]["pair"]["videos"] == told

    parts = run.table("feedback").parts()
    no_pools(monkeypatch)
    assert sum(count["done"] for count in generate(recipe, run, MODELS).values()) == 0
    assert run.table("feedback").parts() == parts


@pytest.mark.slow
def test_adaptive_rendering_goes_on_after_a_kill_and_a_full_disk(tmp_path: Path, faults: Path) -> None:
    recipe, run = adaptive_run(tmp_path / "whole", faults, 6)
    generate(recipe, run, MODELS)
    complete = outputs(run)

    (faults / "render-q1-1").write_text("disk full", "utf-8")
    recipe, run = adaptive_run(tmp_path / "broken", faults, 6)
    with pytest.raises(GenerationError, match="disk full"):
        generate(recipe, run, MODELS)
    (faults / "render-q1-1").unlink()
    # What is left of two tables after a kill: some of the rows that left each stage.
    for name, share in (("feedback", 2), ("renders", 3)):
        for part in run.table(name).parts()[::share]:
            os.unlink(f"{run.table(name).path}/{part}")
    generate(recipe, run, MODELS)
    assert outputs(run) == complete


@pytest.mark.slow
def test_adaptive_rendering_gives_up_and_retries_row_by_row(tmp_path: Path, faults: Path) -> None:
    (faults / "render-q0-0").write_text("black frames", "utf-8")
    (faults / "render-q2-1").write_text("kill", "utf-8")
    recipe, run = adaptive_run(tmp_path, faults, 4)
    generate(recipe, run, MODELS)
    rows = {(r["query"][:2], r["k"]): r for r in run.table("feedback").rows()}
    assert {key for key, row in rows.items() if row["error"]} == {("q0", 0), ("q2", 1)}
    # The third video stands in for the one that failed.
    assert rows["q0", 2]["score"] == rows["q2", 2]["score"] == 2.0
    assert len(rows) == 16

    (faults / "render-q0-0").unlink()
    (faults / "render-q2-1").unlink()
    assert generate(recipe, run, MODELS, retry_errors=True)["render"]["done"] == 2
    assert all(row["error"] is None for row in run.table("feedback").rows())


@pytest.mark.slow
def test_adaptive_rendering_stage_by_stage(tmp_path: Path, faults: Path) -> None:
    recipe, run = adaptive_run(tmp_path, faults, 4)
    generate(recipe, run, MODELS, ["sample", "judge"])
    made = []
    for _ in range(3):
        made.append(generate(recipe, run, MODELS, ["render"])["render"]["done"])
        generate(recipe, run, MODELS, ["score"])
    assert made == [8, 2, 0], "a round of rendering waits for the scores of the one before"
    assert len(outputs(run)) == 16
