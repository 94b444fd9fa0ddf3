"""What MLflow's file store has of a run after its report, and after its evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.evaluation.evaluate import Evaluated
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.recipe import Recipe, load
from vpo_ray.report import build_report
from vpo_ray.report.run_trackers import track_run
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
RESULTS = {
    "results": {
        "held out": {"render": {"dpo": {"truth": {"value": 0.9}, "verdict.aligned": {"value": None}}}}
    }
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load(TINY, [f"out={tmp_path / 'run'}", "dpo.track.mlflow=true", "dpo.track.project=prompts"])


def tracked(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(folder.as_uri())
    return client.search_runs([client.get_experiment_by_name("prompts").experiment_id])


def test_one_entry_has_the_funnel_the_evaluation_and_both_pages(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = RunDir(recipe.out)
    run.write_json("ledger.json", build_ledger(run, recipe))
    build_report(run, recipe)
    track_run(run, recipe)
    [entry] = tracked(tmp_path / "mlruns")
    assert entry.info.run_name == recipe.name
    assert entry.data.metrics["funnel/candidates"] == 0
    assert entry.data.metrics["render/errored"] == 0
    folder = RunDir(run.at("evaluation/one"))
    folder.write("results.json", json.dumps(RESULTS).encode())
    folder.write("report.html", b"<p>page</p>")
    track_run(run, recipe, Evaluated(folder, RESULTS, []))
    [entry] = tracked(tmp_path / "mlruns")
    figures = {name: value for name, value in entry.data.metrics.items() if name.startswith("evaluation")}
    assert figures == {"evaluation/held out/render/dpo/truth": 0.9}
    stored = {p.name for p in Path(entry.info.artifact_uri.removeprefix("file://")).rglob("*") if p.is_file()}
    assert stored == {"ledger.json", "index.html", "results.json", "report.html"}


def test_a_server_that_is_down_costs_a_warning(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    track_run(RunDir(recipe.out), recipe)
    assert [r.getMessage() for r in caplog.records if "MLflow gets nothing of the run" in r.getMessage()]


def test_a_recipe_without_trackers_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    plain = load(TINY, [f"out={tmp_path / 'run'}"])
    track_run(RunDir(plain.out), plain)
    assert not (tmp_path / "mlruns").exists()
