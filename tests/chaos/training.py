"""The scene of training: DPO with ZeRO-3 on the pairs of the undisturbed generation, on two nodes."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from chaos.generation import Generation
from chaos.outcome import Difference, curve, difference, steps_told_twice
from chaos.scene import RECIPE
from vpo_ray.storage.run_dir import RunDir

# Of a few pairs, long enough to be hit.
DPO = """{epochs: 80, lr: 1.0e-4, schedule: constant, beta: 0.1, global_batch: 2, micro_batch: 1,
max_length: 512, dtype: float32, zero_stage: 3, workers: 2, use_gpu: false,
resources_per_worker: {CPU: 0.3, train: 1}, save_steps: 30, max_failures: 9}"""
# The largest difference of a weight that summing in another order may make.
TOLERANCE = 1e-4


class Training(Generation):
    """Its rows are the steps of the curve."""

    name = "train"

    def prepare(self) -> None:
        Generation(self.folder, self.models, self.cluster).prepare()
        super().prepare()

    def begin(self, folder: Path) -> None:
        for table in ("queries", "feedback", "pairs"):
            shutil.copytree(self.folder / "generate-undisturbed" / table, folder / table)

    def command(self, folder: Path) -> list[str]:
        return self.vpo("dpo", {**self.sets(), "dpo": DPO}, str(RECIPE), "--out", str(folder))

    def compare(self, folder: Path) -> tuple[Difference, list[str]]:
        run = RunDir(folder)
        steps = [{"step": curve(RunDir(place))} for place in (self.reference, folder)]
        differs = difference(steps[0], steps[1], steps_told_twice(run))
        policies = [
            load_file(place / "checkpoints/dpo/model.safetensors") for place in (self.reference, folder)
        ]
        wrong = [
            f"weight {name} is off by {off:.2g}"
            for name, weight in policies[0].items()
            if (off := float(np.abs(weight - policies[1][name]).max())) > TOLERANCE
        ]
        # What a phase was resumed from is cleared away when it is done.
        wrong += [f"{path.name} was left" for path in (folder / "checkpoints").glob("dpo-*")]
        return differs, wrong
