"""Whatever ends a run, the ledger counts what it made, and the reason is what the user sees."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_ray import cli
from vpo_ray import recipe as recipes
from vpo_ray.evaluation.evaluate import evaluate
from vpo_ray.files.folder import StorageError
from vpo_ray.loop import opening, phases, policies, streams
from vpo_ray.loop.ledger import funnel
from vpo_ray.recipe import Recipe
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream import connection
from vpo_ray.stream.pipeline import GenerationError
from vpo_ray.stream.placement import PlacementError

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    queries = tmp_path / "q.txt"
    queries.write_text("\n".join(f"a cat, number {n}" for n in range(20)), "utf-8")
    given = [f"out={tmp_path / 'run'}", f"queries.path={queries}", "sft=null"]
    return recipes.load(TINY, [*given, "queries.splits={dpo: 0.5, eval: 0.5}"])


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


ENDS = [
    GenerationError("18 of 20 rows failed"),
    PlacementError("no node can take a replica"),
    StorageError("cannot write"),
    policies.LoopError("nothing to train on"),
    ZeroDivisionError("a bug"),
    KeyboardInterrupt(),
    connection.Terminated(),
    SystemExit(3),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_the_loop_leaves_its_ledger_whatever_ends_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    monkeypatch.setattr(phases, "generate_feedback", raising(end))
    with pytest.raises(type(end)) as caught:
        phases.run_loop(recipe)
    assert caught.value is end
    assert RunDir(recipe.out).read_json("ledger.json")["stages"]["curate"]["in"] == 20


def test_a_ledger_that_is_older_than_the_failure_is_replaced(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opening.open_run(recipe)
    run.write_json("ledger.json", {"stages": {}})
    monkeypatch.setattr(phases, "generate_feedback", raising(GenerationError("no")))
    with pytest.raises(GenerationError):
        phases.run_loop(recipe)
    assert run.read_json("ledger.json")["stages"]["curate"]["in"] == 20


@pytest.mark.parametrize("end", [GenerationError("18 of 20 rows failed"), connection.Terminated()])
def test_a_ledger_that_cannot_be_written_hides_no_error(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, end: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(phases, "generate_feedback", raising(end))
    monkeypatch.setattr(opening, "build_ledger", raising(StorageError("the disk is gone")))
    with pytest.raises(type(end)) as caught:
        phases.run_loop(recipe)
    assert caught.value is end
    assert "ledger.json could not be written: the disk is gone" in caplog.text


def test_a_command_of_one_stage_leaves_its_ledger(tmp_path: Path) -> None:
    """Really failing: all rows dropped, and no feedback to pair."""
    (tmp_path / "q.txt").write_text("\n\n\n", "utf-8")
    curate = [TINY, "--out", str(tmp_path / "a"), "--set", f"queries.path={tmp_path / 'q.txt'}"]
    assert cli.main(["curate", *curate]) == 2
    assert RunDir(tmp_path / "a").read_json("ledger.json")["stages"]["curate"]["dropped"] == {"empty": 3}
    assert cli.main(["pair", TINY, "--out", str(tmp_path / "b")]) == 1
    assert RunDir(tmp_path / "b").read_json("ledger.json")["stages"]["pair"]["out"] == 0


def test_an_evaluation_leaves_the_ledgers_of_its_policies(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opening.open_run(recipe)
    phases.curate_queries(recipe, run)
    run.write_json("checkpoints/dpo/vpo.json", {})
    monkeypatch.setattr(streams, "generate", raising(GenerationError("no")))
    with pytest.raises(GenerationError):
        evaluate(recipe.model_copy(update={"evaluate": None}), run)
    own = RunDir(run.at(f"evaluation/policy-{phases.starting_policy(recipe, run).identity}"))
    held_out = sum(row["split"] == "eval" for row in run.table("queries").rows())
    assert own.read_json("ledger.json")["stages"]["curate"]["out"] == held_out > 0


def test_what_a_whole_run_did_stays_in_its_ledger(recipe: Recipe) -> None:
    run = RunDir(recipe.out)
    opening.write_ledger(recipe, run, {"wall_seconds": 7.5})
    run.table("queries").append([{"query_id": "q", "query": "a cat", "split": "dpo"}])
    opening.write_ledger(recipe, run)
    assert funnel(run.read_json("ledger.json"))["queries"] == 1
    assert run.read_json("ledger.json")["last_run"] == {"wall_seconds": 7.5}
    opening.write_ledger(recipe, run, {"wall_seconds": 0.2})
    assert run.read_json("ledger.json")["last_run"] == {"wall_seconds": 0.2}
    run.write("ledger.json", b"{")
    opening.write_ledger(recipe, run)
    assert "last_run" not in run.read_json("ledger.json"), "a damaged one is made anew"
