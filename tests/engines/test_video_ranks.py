"""Several processes render one video together: the same video, and no rank outlives the others."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import ValidationError
from tiny_video_models import make_tiny, tiny_settings

from vpo_ray.engines.video import RenderTimeout, VideoEngine
from vpo_ray.engines.video_model import VideoModelError
from vpo_ray.recipe import Render

RANKS = {"device": "cpu", "context_parallel": 2}
LIMIT_S = 120

# Prints the process id of rank 1, then renders until something happens to it.
ENDLESS = """
import json, sys, psutil
from vpo_ray.engines.video import DeviceLostError, VideoEngine
from vpo_ray.recipe import Render

if __name__ == "__main__":
    engine = VideoEngine(Render(**json.loads(sys.argv[1])))
    (rank,) = [c for c in psutil.Process().children() if "spawn_main" in str(c.cmdline())]
    print(rank.pid, flush=True)
    try:
        while True:
            engine.render(["a cat"], [1])
    except DeviceLostError as error:
        print("lost:", error, flush=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(name, folder / name) for name in ("wan2.1-1.3b", "ltx-video")}


@pytest.mark.engine
def test_two_ranks_render_the_video_of_one(models: dict[str, Path]) -> None:
    settings = tiny_settings("wan2.1-1.3b", models["wan2.1-1.3b"])
    (alone,) = VideoEngine(Render(**settings)).render(["a cat"], [1])
    engine = VideoEngine(Render(**settings, **RANKS))
    try:
        engine.warm_up()
        (together,) = engine.render(["a cat"], [1])
    finally:
        engine.close()
    assert isinstance(alone, np.ndarray), alone
    assert isinstance(together, np.ndarray), together
    assert np.abs(alone.astype(int) - together).max() <= 1


@pytest.mark.engine
def test_ranks_give_up_together_and_go_on(models: dict[str, Path]) -> None:
    settings = tiny_settings("wan2.1-1.3b", models["wan2.1-1.3b"]) | RANKS
    engine = VideoEngine(Render(**settings))
    try:
        engine.settings = engine.settings.model_copy(update={"time_limit_s": 1e-9})
        (late,) = engine.render(["a cat"], [1])
        engine.settings = engine.settings.model_copy(update={"time_limit_s": 600.0})
        (video,) = engine.render(["a cat"], [1])
    finally:
        engine.close()
    assert isinstance(late, RenderTimeout)
    assert isinstance(video, np.ndarray), video


@pytest.mark.engine
def test_a_model_that_cannot_be_split_is_refused_and_its_ranks_end(
    tiny_models: Path, models: dict[str, Path]
) -> None:
    size = {"frames": 9, "height": 32, "width": 48, "steps": 2, "dtype": "float32"}
    with pytest.raises(VideoModelError, match="CogVideoXTransformer3DModel cannot be split"):
        VideoEngine(Render(model=str(tiny_models / "video"), **size, **RANKS))
    with pytest.raises(VideoModelError, match="LTXVideoTransformer3DModel cannot be split"):
        VideoEngine(Render(**tiny_settings("ltx-video", models["ltx-video"]), **RANKS))
    settings = tiny_settings("wan2.1-1.3b", models["wan2.1-1.3b"]) | {"frames": 9, "width": 48}
    with pytest.raises(VideoModelError, match="has 9 tokens, which 2 GPUs cannot share evenly"):
        VideoEngine(Render(**settings, **RANKS))
    ended, alive = psutil.wait_procs(_ranks(), timeout=LIMIT_S)
    assert not alive, f"of {len(ended) + len(alive)} ranks"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["rank 0", "rank 1"])
def test_no_rank_outlives_another(killed: str, models: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    settings = Render(**tiny_settings("wan2.1-1.3b", models["wan2.1-1.3b"]) | {"steps": 200} | RANKS)
    command = [sys.executable, str(script), settings.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            rank = psutil.Process(int(process.stdout.readline()))
            os.kill(process.pid if killed == "rank 0" else rank.pid, signal.SIGKILL)
            said, _ = process.communicate(timeout=LIMIT_S)
            rank.wait(LIMIT_S)
        finally:
            process.kill()
    assert ("its process died" in said) == (killed == "rank 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel": 2}, "set pool.num_gpus=2"),
        ({**RANKS, "cache": "first_block"}, "does not go together with cache"),
        ({**RANKS, "offload": "model"}, "does not go together with offload"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Render(model="m", **options)


def _ranks() -> list[psutil.Process]:
    """The ranks that this process started and that are not reaped yet."""
    ranks = {child.pid for child in multiprocessing.active_children()}
    return [child for child in psutil.Process().children() if child.pid in ranks]
