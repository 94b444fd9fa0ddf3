"""A run whose judge, video model and reward are others': the reward is the example's."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OTHERS = '''
import json
import numpy as np
from pydantic import BaseModel
from vpo_ray.engines.chat import Answer
from vpo_ray.engines.video import RenderError, VideoModel

class NoOptions(BaseModel):
    pass

class Kind:
    """Finds every prompt aligned."""
    Options = NoOptions
    def __init__(self, settings, options):
        pass
    async def complete(self, messages, sampling, schema=None):
        said = {"critique": "so", "missing": [], "added": [], "verdict": "aligned"}
        return Answer(json.dumps(said), "stop", 7, 5)

class Grey(VideoModel):
    """A video as bright as the prompt says, in per cent."""
    class Options(BaseModel):
        noise: int = 4
    def __init__(self, settings, options):
        self.settings, self.options = settings, options
    def render(self, prompts, seeds):
        return [self._render(*one) for one in zip(prompts, seeds)]
    def _render(self, prompt, seed):
        if not prompt.isdigit():
            return RenderError("no number") if prompt == "none" else np.zeros((2, 2))
        shape = self.settings.frames, self.settings.height, self.settings.width, 3
        noise = np.random.default_rng(seed).integers(0, self.options.noise, shape)
        return np.clip(int(prompt) * 255 // 100 + noise, 0, 255).astype(np.uint8)
'''
RUN = """
import json, sys
import ray
from vpo_ray.loop import phases
from vpo_ray.recipe import load
from vpo_ray.records import FEEDBACK
from vpo_ray.stages.sample import candidates
from vpo_ray.storage.run_dir import RunDir
from vpo_ray.stream.pipeline import GenerationError, Models, generate

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[2])
recipe = load(sys.argv[1])
prompts = ["10", "50", "90", "none", "flat"]

def feedback(recipe):
    run = RunDir(recipe.out)
    query = {"query_id": "q", "query": "a cat", "unsafe": None}
    made = candidates(query, recipe.sample, "policy", recipe.seed)
    empty = dict.fromkeys(FEEDBACK.names)
    run.table("candidates").append([{**empty, **row, "prompt": text} for row, text in zip(made, prompts)])
    generate(recipe, run, Models("nowhere", "policy"), ("judge", "render", "score"))
    return sorted(run.table("feedback").rows(), key=lambda row: row["k"])

rows = feedback(recipe)
other = recipe.reward.kind.partition("@")[0] + "@0.0.9"
reward = recipe.reward.model_copy(update={"kind": other})
other = recipe.model_copy(update={"reward": reward, "out": recipe.out + "2"})
try:
    refused = str(feedback(other))
except GenerationError as error:
    refused = str(error)
with open(sys.argv[3], "w") as file:
    json.dump({"rows": rows, "refused": refused, "judge": recipe.judge.backend}, file)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package, as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(ROOT / "examples/vpo-brightness", folder / "source")
    target = folder / "packages"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--disable-pip-version-check", "--target", target, source], check=True)
    return target


def run(installed: Path, *command: Any) -> str:
    path = os.pathsep.join(map(str, (installed, ROOT)))
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_lists_what_is_here_and_what_cannot_be_imported(installed: Path) -> None:
    info = installed / "broken-2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2\n", "utf-8")
    (info / "entry_points.txt").write_text("[vpo_ray.video]\nworse = nowhere_at_all:Model\n", "utf-8")
    listed = run(installed, "-m", "vpo_ray.cli", "plugins")
    lines = {tuple(line.split()[:2]): line for line in listed.splitlines()}
    assert "built in" in lines["render.kind", "diffusers"]
    assert "vpo-brightness 0.1.0, vpo_brightness:Brightness" in lines["reward.kind", "brightness"]
    assert "broken 2, nowhere_at_all:Model: " in lines["render.kind", "worse"]
    assert "ModuleNotFoundError: No module named" in lines["render.kind", "worse"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_models_of_others(installed: Path, tmp_path: Path) -> None:
    (installed / "others.py").write_text(OTHERS, "utf-8")
    text = (ROOT / "jobs/recipes/tiny.yaml").read_text("utf-8")
    changes = {
        "out": str(tmp_path / "run"),
        "judge": {"backend": "others:Kind", "pool": {"num_cpus": 0.1}},
        "render": {
            "kind": "others:Grey", "options": {"noise": 9}, "frames": 5, "height": 32, "width": 32, "crf": 0,
            "pool": {"num_cpus": 0.1},
        },
        "reward": {"kind": "brightness", "options": {"target": 0.9}, "pool": {"num_cpus": 0.1}},
    }  # fmt: skip
    tree = yaml.safe_load(text) | changes
    tree["sample"]["k"] = 5
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    (tmp_path / "run.py").write_text(RUN, "utf-8")
    # The paths of Ray's sockets may have 107 characters, so its folder has a short name.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        run(installed, tmp_path / "run.py", tmp_path / "recipe.yaml", folder, tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text("utf-8"))
    rows = told["rows"]
    assert told["judge"].startswith("others:Kind@")
    assert [row["verdict"] for row in rows] == ["aligned"] * 5
    assert [(row["frames"], row["width"], row["fps"]) for row in rows[:3]] == [(5, 32, 8.0)] * 3
    assert {row["reward"] for row in rows[:3]} == {"vpo_brightness:Brightness@0.1.0"}
    assert rows[0]["score"] < rows[1]["score"] < rows[2]["score"]
    brightness = [{d["name"]: d["score"] for d in row["dimensions"]}["brightness"] for row in rows[:3]]
    assert brightness == pytest.approx([0.2, 0.6, 1.0], abs=0.05)
    assert (rows[3]["error_stage"], rows[3]["score"]) == ("render", None)
    assert "no number" in rows[3]["error"]
    assert "the video model returned what is no video: frames are uint8" in rows[4]["error"]
    assert rows[0]["usage"]["judge"]["prompt"] == 7
    assert "vpo_brightness:Brightness has version 0.1.0 here, and not 0.0.9" in told["refused"]
