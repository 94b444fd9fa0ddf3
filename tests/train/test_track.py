"""Trackers: TensorBoard in the run directory, MLflow in a file store, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.recipe import Track
from vpo_ray.records import Row
from vpo_ray.train import TrainError
from vpo_ray.train.track import Trackers, check_trackers, values_of

LINES: list[Row] = [
    {"step": n, "time": 1e9, "loss": 1 / n, "rows": 8, "warnings": {"a": "b"}} for n in range(1, 4)
]
LINES[1]["eval_loss"] = 0.7


def trackers(track: Track, folder: Path, curve: list[Row] | None = None) -> Trackers:
    return Trackers(track, "dpo", str(folder), "job-1", "tiny dpo", {"lr": 1e-3}, curve or [])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the format read below is its

    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.glob("events*"):
        data = path.read_bytes()
        while data:
            # TFRecord: length (8 bytes), its CRC (4), the event, its CRC (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 4)))
            data = data[16 + length :]
    return found


def test_tensorboard_shows_every_step_once_also_after_a_restart(tmp_path: Path):
    before = trackers(Track(), tmp_path)
    for line in LINES[:2]:
        before.log(line)
    before.close()
    # The restart goes on behind step 1: step 2 is run again.
    after = trackers(Track(), tmp_path, LINES[:1])
    for line in LINES[1:]:
        after.log(line)
    after.close()
    found = scalars(tmp_path / "metrics/tensorboard/dpo")
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert found["eval/loss"] == [(2, 0.7)]
    assert "train/warnings" not in found


def test_mlflow_gets_the_curve_and_a_restart_goes_on_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    track = Track(mlflow=True, tensorboard=False, project="prompts")
    check_trackers(track)
    for part in (LINES[:2], LINES[2:]):
        one = trackers(track, tmp_path)
        for line in part:
            one.log(line)
        one.close()
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("prompts").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["lr"]) == ("tiny dpo", "FINISHED", "0.001")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3),
    ]  # fmt: skip


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    both = trackers(Track(mlflow=True), tmp_path)
    for line in LINES:
        both.log(line)
    both.close()
    assert len([r for r in caplog.records if "MLflow gets no more" in r.getMessage()]) == 1
    assert len(scalars(tmp_path / "metrics/tensorboard/dpo")["train/loss"]) == 3


def test_what_is_missing_is_named_before_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrainError, match=r"track\.mlflow needs the environment variable MLFLOW_TRACKING_URI"):
        check_trackers(Track(mlflow=True))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainError, match=r'pip install "vpo-ray\[wandb\]"'):
        check_trackers(Track(wandb=True))
    check_trackers(Track())


def test_only_numbers_are_values():
    assert values_of(LINES[1]) == {"loss": 0.5, "rows": 8.0, "eval_loss": 0.7}
