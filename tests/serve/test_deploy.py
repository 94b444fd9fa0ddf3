"""A job that deploys the trained policy ends, and the endpoint stays; the same job again changes nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from clusters import free_port, head, python
from s3_server import bucket, upload

from vpo_ray.files.folder import Folder
from vpo_ray.serve.config import fingerprint
from vpo_ray.storage.cache_folder import VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
REPLICAS = """
import json, ray
from ray.serve.context import _get_global_client

ray.init(log_to_driver=False, namespace="serve")
deployments = _get_global_client().get_serve_details()["applications"]["vpo"]["deployments"]
print(json.dumps({name: sorted(r["replica_id"] for r in d["replicas"]) for name, d in deployments.items()}))
"""


@pytest.fixture(params=["disk", "store"])
def own(
    request: pytest.FixtureRequest, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A checkpoint of the test's own, in a folder or at a URI."""
    if request.param == "disk":
        yield shutil.copytree(checkpoint, str(tmp_path / "checkpoint"))
        return
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    with bucket("models") as options:
        yield upload(Path(checkpoint), f"s3://models/checkpoint?{options}")


def test_deployed_twice_it_is_the_same_endpoint(own: str, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    asked = {"model": "vpo", "max_tokens": 8, "messages": [{"role": "user", "content": "a cat"}]}
    job = ["jobs/serve_deploy.py", "--recipe", TINY, "--out", str(tmp_path / "run")]
    job += ["--set", f"serve.port={port}", "--set", "serve.max_tokens=8"]
    with head(tmp_path / "head.log", cpus=2) as (address, _):
        early = python(address, *job, timeout=200)
        assert early.returncode == 2, early.stderr[-4000:]
        assert "checkpoints/dpo does not exist" in early.stderr
        job += ["--checkpoint", own]
        replicas = []
        for _ in range(2):
            told = python(address, *job, timeout=400)
            assert told.returncode == 0, told.stderr[-6000:]
            assert f"deployed {own} as 'vpo'" in told.stdout
            answer = httpx.post(url, json=asked, timeout=60).json()
            assert answer["system_fingerprint"] == fingerprint(own)
            replicas.append(json.loads(python(address, "-c", REPLICAS).stdout.splitlines()[-1]))
        assert replicas[0] == replicas[1]
        assert all(replicas[0].values())

        # A checkpoint that was trained again in the same folder is another version.
        Folder(own).write("generation_config.json", Folder(own).read("generation_config.json") + b"\n")
        told = python(address, *job, timeout=400)
        assert told.returncode == 0, told.stderr[-6000:]
        answer = httpx.post(url, json=asked, timeout=60).json()
        assert answer["system_fingerprint"] == fingerprint(own)
