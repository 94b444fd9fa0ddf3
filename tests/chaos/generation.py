"""The scenes of generation: real queries are sampled, judged, rendered, scored and paired."""

import json
import shutil
from pathlib import Path

from chaos.command import Command
from chaos.outcome import Difference, difference, made, other_videos, stored_twice, unreconciled
from chaos.scene import RECIPE, ROOT
from vpo_ray.storage.run_dir import RunDir

QUERIES = 24


class Generation(Command):
    """The whole stream."""

    name = "generate"

    def command(self, folder: Path) -> list[str]:
        return self.vpo("run", {**self.sets(), "dpo": "null"}, str(RECIPE), "--out", str(folder))

    def sets(self) -> dict[str, object]:
        """What differs from the tiny recipe: fewer rows in smaller blocks, and where the pools are."""
        queries = self.folder / "queries.json"
        if not queries.exists():
            lines = (ROOT / "vpo_ray/data/queries.jsonl").read_text("utf-8").splitlines()
            queries.write_text(json.dumps([json.loads(line)["query"] for line in lines[:QUERIES]]), "utf-8")
        return {
            "queries.path": queries,
            "queries.splits": "{dpo: 1}",
            "sample.k": 2,
            "sample.engine.batch_size": 4,
            "judge.engine.batch_size": 4,
            "sample.pool": "{num_cpus: 0.3, resources: {llm: 1}}",
            "judge.pool": "{num_cpus: 0.3, resources: {llm: 1}}",
            "render.pool": "{num_cpus: 0.3, resources: {video: 1}}",
            "reward.pool": "{num_cpus: 0.3, resources: {video: 1}}",
            "sft": "null",
        }

    def compare(self, folder: Path) -> tuple[Difference, list[str]]:
        run = RunDir(folder)
        reference = RunDir(self.reference)
        differs = difference(made(reference), made(run), stored_twice(run))
        lost = (*differs.lost, *other_videos(reference, run))
        return Difference(lost, differs.duplicated), unreconciled(run)


class Rendering(Generation):
    """The same run from its verdicts on, so that no fault of the videos' stages waits for an LLM. All
    prompts pass for aligned, for more videos."""

    name = "render"

    def prepare(self) -> None:
        Generation(self.folder, self.models, self.cluster).prepare()
        super().prepare()

    def begin(self, folder: Path) -> None:
        before, run = RunDir(self.folder / "generate-undisturbed"), RunDir(folder)
        for name in ("queries", "candidates"):
            shutil.copytree(f"{before.path}/{name}", folder / name)
        rows = before.table("verdicts").rows()
        run.table("verdicts").replace({**row, "verdict": "aligned"} for row in rows)
