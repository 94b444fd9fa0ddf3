"""The render stage in its pool: real renders on Ray, in blocks of one row."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from vpo_ray.recipe import Pool, Render
from vpo_ray.records import FEEDBACK, Row, table
from vpo_ray.stages.render import Renderer
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.actor_pools import Outcome, batch_pool, progress_handle

pytestmark = [pytest.mark.engine, pytest.mark.ray]


class Counted(Renderer):
    """Leaves the number of its renders so far beside the store, as the name of a file."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        done = super().__call__(rows)
        (Path(self.store.folder.path).parent / f"rendered-{self.rendered}").touch()
        return done


@pytest.fixture
def settings(tiny_models: Path) -> Render:
    size = {"frames": 9, "height": 32, "width": 48}
    return Render(model=str(tiny_models / "video"), dtype="float32", steps=2, **size)


def candidate(k: int, prompt: str, query: str = "q") -> Row:
    key = {"candidate_id": f"{query}{k}", "query_id": query, "query": "a query", "k": k, "seed": 5}
    return {**key, "prompt": prompt, "verdict": "aligned"}


def through_the_pool(
    rows: list[Row], settings: Render, folder: Path
) -> tuple[list[Row], dict[str, Any], int]:
    """The rows after the pool, what its progress counted, and how many videos were rendered."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run, progress = RunDir(folder), progress_handle(["render"])
    stage = partial(Counted, settings, f"{folder}/videos", 7)
    outcome = Outcome("render", run.table("renders"), progress)
    blocks = ray.data.from_arrow([table([row], FEEDBACK) for row in rows])
    pool = Pool(size=1, num_cpus=0.1)
    made = batch_pool(blocks, pool, stage=stage, outcome=outcome, batch_size=1, calls=2).take_all()
    counts = ray.get(progress.snapshot.remote())["render"]
    renders = max(int(file.name.partition("-")[2]) for file in folder.glob("rendered-*"))
    return sorted(made, key=lambda row: row["candidate_id"]), counts, renders


def test_a_prompt_that_a_query_has_twice_is_rendered_once(
    ray_cluster: None, settings: Render, tmp_path: Path
) -> None:
    prompts = ["a cat", "a cat", "a dog", "a cat", "a dog", "a cat"]
    rows = [candidate(k, prompt) for k, prompt in enumerate(prompts)]
    rows.append(candidate(0, "a cat", query="r"))
    made, counts, renders = through_the_pool(rows, settings, tmp_path)
    keys = [row["video_key"] for row in made]
    assert keys[0] == keys[1] == keys[3] == keys[5]
    assert keys[2] == keys[4]
    assert len(set(keys)) == renders == 3
    assert counts["done"] == 7
    # The replica's start is in nobody's seconds.
    assert counts["warm_up_s"] > sum(row["seconds"]["render"] for row in made) / 7
