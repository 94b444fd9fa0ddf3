"""Where a training curve goes beside `metrics/<phase>.jsonl`: Ray's metrics, TensorBoard, MLflow, W&B.

Rank 0 has one `Trackers` for all trackers of the recipe. One that fails is logged once and dropped: a
curve is not worth a training run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from vpo_ray.files.folder import Folder
from vpo_ray.recipe import Track
from vpo_ray.records import Row
from vpo_ray.train.examples import Phase, TrainError

log = logging.getLogger(__name__)

NOT_VALUES = ("step", "time")
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")  # of MLflow's metrics


class Tracker(Protocol):
    """One destination. Steps arrive in order; after a restart, from the last checkpoint on."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(track: Track) -> None:
    """Refuse a tracker that cannot work, before a worker starts.

    Raises:
        TrainError: its package is not installed, or its address is not in the environment.
    """
    for name, wanted, variable in (
        ("mlflow", track.mlflow, "MLFLOW_TRACKING_URI"),
        ("wandb", track.wandb, "WANDB_API_KEY"),
    ):
        if not wanted:
            continue
        if importlib.util.find_spec(name) is None:
            raise TrainError(f'track.{name} needs the {name} package: pip install "vpo-ray[{name}]"')
        offline = name == "wandb" and os.environ.get("WANDB_MODE") in ("offline", "disabled")
        if not os.environ.get(variable) and not offline:
            raise TrainError(f"track.{name} needs the environment variable {variable}, on every node")


class Trackers:
    """All trackers of a phase.

    Args:
        track: the recipe's section.
        phase: names TensorBoard's folder, `<run>/metrics/tensorboard/<phase>`.
        run_uri: the run directory.
        run_id: the same for every start of this phase, so that a restart continues the same run.
        run_name: for people.
        settings: what MLflow and W&B show as the run's parameters.
        curve: the steps before this start, from which TensorBoard's file is rewritten.
        status: handle of the `Steps` actor from which the driver shows how far it is.
    """

    def __init__(
        self,
        track: Track,
        phase: Phase,
        run_uri: str,
        run_id: str,
        run_name: str,
        settings: Row,
        curve: Sequence[Row],
        status: Any = None,
    ) -> None:
        name = track.run_name or run_name
        makers: dict[str, Callable[[], Tracker]] = {"Ray's metrics": lambda: RayMetrics(phase)}
        if status is not None:
            makers["The status"] = lambda: StepStatus(status)
        if track.tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(
                Folder(run_uri) / f"metrics/tensorboard/{phase}", curve
            )
        if track.mlflow:
            makers["MLflow"] = lambda: MLflow(track.project, run_id, name, settings)
        if track.wandb:
            makers["Weights & Biases"] = lambda: WandB(track.project, run_id, name, settings)
        self._trackers: dict[str, Tracker] = {}
        for title, make in makers.items():
            with self._or_without(title):
                self._trackers[title] = make()

    def log(self, line: Row) -> None:
        values = values_of(line)
        for title, tracker in list(self._trackers.items()):
            with self._or_without(title):
                tracker.log(line["step"], values)

    def flush(self) -> None:
        for title, tracker in list(self._trackers.items()):
            with self._or_without(title):
                tracker.flush()

    def close(self, failed: bool = False) -> None:
        for title, tracker in list(self._trackers.items()):
            with self._or_without(title):
                tracker.close(failed)

    @contextmanager
    def _or_without(self, title: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  any client may fail in any way
            self._trackers.pop(title, None)
            log.warning("%s gets no more of the curve: %s: %s", title, type(error).__name__, error)


def values_of(line: Row) -> dict[str, float]:
    """The numbers of a step's line."""
    return {k: float(v) for k, v in line.items() if isinstance(v, int | float) and k not in NOT_VALUES}


class RayMetrics:
    """Gauges for Prometheus: `vpo_train_<name>` with the phase as tag."""

    NAMES = ("loss", "lr", "grad_norm", "tokens", "seconds", "accuracy", "margin", "eval_loss")

    def __init__(self, phase: Phase) -> None:
        from ray.util.metrics import Gauge

        self._phase = {"phase": phase}
        self._gauges = {
            name: Gauge(f"vpo_train_{name}", f"{name} of the last training step", tag_keys=("phase",))
            for name in self.NAMES
        }

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name], tags=self._phase)

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class StepStatus:
    """Tells the driver's status each step."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def log(self, step: int, values: dict[str, float]) -> None:
        shown = {name: values[name] for name in ("loss", "tokens", "seconds") if name in values}
        self._status.tell.remote(doing="training", step=step, **shown)

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """An event file in the run directory: written in place on a local disk; for an object store, to a
    temporary file that every flush uploads."""

    def __init__(self, folder: Folder, curve: Sequence[Row]) -> None:
        from tensorboardX import SummaryWriter

        self._folder = folder
        info = folder.fs.get_file_info(folder.path)
        if info.type == pafs.FileType.Directory:
            folder.fs.delete_dir(folder.path)
        self._local = Path(folder.path if folder.is_local else tempfile.mkdtemp(prefix="vpo-tensorboard-"))
        self._writer = SummaryWriter(str(self._local), flush_secs=10)
        for line in curve:
            self.log(line["step"], values_of(line))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            group = "eval" if name.startswith("eval_") else "train"
            self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, step)

    def flush(self) -> None:
        self._writer.flush()
        if not self._folder.is_local:
            for path in self._local.iterdir():
                self._folder.write(path.name, path.read_bytes())

    def close(self, failed: bool) -> None:
        self.flush()
        self._writer.close()
        if not self._folder.is_local:
            shutil.rmtree(self._local)


class MLflow:
    """A run in the experiment `project` of MLFLOW_TRACKING_URI; a restart finds it by its tag."""

    TAG = "vpo_ray.job"

    def __init__(self, project: str, run_id: str, name: str, settings: Row) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        runs = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{run_id}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(
                experiment, run_name=name, tags={self.TAG: run_id}
            ).info.run_id
            for key, value in settings.items():
                self._client.log_param(self._run, key, value)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step, synchronous=False)

    def put(self, numbers: dict[str, float], files: dict[str, str]) -> None:
        """Numbers without steps, and texts as artifacts, by name."""
        for name, value in numbers.items():
            self._client.log_metric(self._run, _NOT_IN_NAMES.sub("_", name), value)
        for name, text in files.items():
            self._client.log_text(self._run, text, name)

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None:
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandB:
    """A run of W&B; the same id lets a restart continue it."""

    def __init__(self, project: str, run_id: str, name: str, settings: Row) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project, id=run_id[:32], name=name, config=settings, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def put(self, numbers: dict[str, float], files: dict[str, str]) -> None:
        """Numbers into the run's summary, and texts as its files, by name."""
        self._run.summary.update(numbers)
        for name, text in files.items():
            path = Path(self._run.dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            self._run.save(str(path), base_path=self._run.dir, policy="now")

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
