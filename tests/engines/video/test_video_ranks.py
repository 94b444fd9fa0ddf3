"""Several processes render one video together: the same video, and no rank outlives the others."""

import json
import os
import pickle
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

from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Render

RANKS = {"device": "cpu", "context_parallel": 2}
LIMIT_S = 120

# Prints the process id of rank 1, then renders until something happens to it.
ENDLESS = """
import json, sys, psutil
from vpo_ray.engines.video import DeviceLostError
from vpo_ray.engines.video.engine import VideoEngine
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

# Makes an engine, renders once for each time limit, and pickles what came of it to stdout.
GIVEN = """
import json, pickle, sys
from vpo_ray.engines.video.engine import VideoEngine
from vpo_ray.recipe import Render

def told(result):
    return f"{type(result).__name__}: {result}" if isinstance(result, Exception) else result

def work():
    try:
        engine = VideoEngine(Render(**json.loads(sys.argv[1])))
    except ValueError as error:
        return [told(error)]
    results = []
    for limit in json.loads(sys.argv[2]):
        engine.settings = engine.settings.model_copy(update={"time_limit_s": limit})
        results.append(told(engine.render(["a cat"], [1])[0]))
    engine.close()
    return results

if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(work()))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(name, folder / name) for name in ("wan2.1-1.3b", "ltx-video")}


def in_a_process(settings: dict[str, Any], *limits: float) -> list[Any]:
    """What an engine gives for the time limits, one after the other, or the error that it is made with. Its
    process is its own: torch has one process group for each, and Ray's driver lives in this one."""
    command = [sys.executable, "-c", GIVEN, Render(**settings).model_dump_json(), json.dumps(limits)]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(pickle.loads(done.stdout))


@pytest.mark.engine
def test_two_ranks_render_the_video_of_one_and_give_up_together(models: dict[str, Path]) -> None:
    settings = tiny_settings("wan2.1-1.3b", models["wan2.1-1.3b"])
    (alone,) = VideoEngine(Render(**settings)).render(["a cat"], [1])
    late, together = in_a_process(settings | RANKS, 1e-9, 600)
    assert late.startswith("RenderTimeout: over the limit")
    assert isinstance(alone, np.ndarray), alone
    assert isinstance(together, np.ndarray), together
    assert np.abs(alone.astype(int) - together).max() <= 1


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("cogvideox", {}, "CogVideoXTransformer3DModel cannot be split"),
        ("ltx-video", {}, "LTXVideoTransformer3DModel cannot be split"),
        ("wan2.1-1.3b", {"frames": 9, "width": 48}, "has 9 tokens, which 2 GPUs cannot share evenly"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(
    name: str, size: dict[str, int], says: str, tiny_models: Path, models: dict[str, Path]
) -> None:
    if name in models:
        settings = tiny_settings(name, models[name]) | size
    else:
        settings = {"model": str(tiny_models / "video"), "frames": 9, "height": 32, "width": 48, "steps": 2}
    (error,) = in_a_process(settings | RANKS)
    assert error.startswith("VideoModelError: ")
    assert says in error


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["rank 0", "rank 1"])
def test_no_rank_outlives_another(killed: str, models: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS, "utf-8")
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
