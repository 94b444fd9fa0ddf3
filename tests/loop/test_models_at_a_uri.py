"""What takes a model takes a URI; messages and commands name places in a store so that they hold."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import python, simulated
from s3_server import bucket, upload

from vpo_ray.cli.summary import run_summary
from vpo_ray.engines.chat.adapter import adapter_of
from vpo_ray.engines.video.weights import on_node, weights_identity
from vpo_ray.files.folder import Folder, join
from vpo_ray.loop.ledger import build_ledger
from vpo_ray.plan.figures import read_ledger
from vpo_ray.recipe import Lora, Serve, load
from vpo_ray.serve.config import serve_config
from vpo_ray.stages.made_with import facts
from vpo_ray.storage.cache_folder import VARIABLE
from vpo_ray.storage.run_dir import RunDir

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bucket("models") as options:
        yield options


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def uri(server: str, tmp_path: Path) -> str:
    return f"s3://models/{tmp_path.name}?{server}"


def test_an_adapter_and_its_base(uri: str, cache: Path) -> None:
    assert adapter_of(uri) is None
    base, place = join(uri, "base"), Folder(join(uri, "adapter"))
    Folder(base).write("config.json", b"{}")
    place.write("adapter_config.json", json.dumps({"base_model_name_or_path": base, "r": 4}).encode())
    place.write("adapter_model.safetensors", b"weights")
    found = adapter_of(place.uri)
    assert found is not None
    assert (found.folder, found.base, found.rank) == (place.uri, base, 4)
    here = found.on_node()
    assert Path(here.folder, "adapter_model.safetensors").read_bytes() == b"weights"
    assert Path(here.base, "config.json").exists()
    assert Path(here.base).parent == cache


def test_a_video_model_and_its_lora_are_what_they_are_on_a_disk(uri: str, tmp_path: Path) -> None:
    """Videos have the same keys, so that neither renders what the other has."""
    model, lora = tmp_path / "video", tmp_path / "lora"
    for file in (model / "model_index.json", model / "vae/model.safetensors", lora / "one.safetensors"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(file.name.encode())
    there = upload(model, join(uri, "video")), upload(lora, join(uri, "lora"))
    identities = set()
    for name, path in ((str(model), str(lora)), there, (there[0], join(there[1], "one.safetensors"))):
        render = load(TINY).render.model_copy(update={"model": name, "lora": Lora(path=path)})
        identities.add(weights_identity(on_node(render)))
    assert len(identities) == 1


def test_where_a_run_is_holds_when_it_is_typed(uri: str) -> None:
    run = RunDir(uri)
    run.write_json("ledger.json", build_ledger(run, load(TINY)))
    run.write_json("checkpoints/dpo/vpo.json", {})
    lines = dict(line.split(None, 1) for line in run_summary(run).splitlines() if "s3://" in line)
    assert lines["policy"] == run.at("checkpoints/dpo")
    assert shlex.split(lines["serve"]) == ["vpo", "serve", run.at("checkpoints/dpo")]
    assert lines["report"] == run.at("report/index.html")
    for given in (uri, run.at("ledger.json")):
        ledger = read_ledger(load(TINY), given)
        assert ledger is not None
        assert ledger.uri == run.at("ledger.json")


def test_rows_are_not_added_beside_those_of_another_model_under_the_same_uri(uri: str) -> None:
    Folder(uri).write("config.json", b"{}")
    recipe = load(TINY, [f"render.model={json.dumps(uri)}"])
    before = facts(recipe, "render")["render.model"]
    Folder(uri).write("config.json", b"{}")
    assert facts(recipe, "render")["render.model"] == before, "the same again is no other model"
    Folder(uri).write("config.json", b"[]")
    assert facts(recipe, "render")["render.model"] != before


def test_a_serve_config_names_the_uri(uri: str) -> None:
    [application] = serve_config(uri, Serve())["applications"]
    assert application["args"]["checkpoint"] == uri


@pytest.mark.engine
@pytest.mark.slow
def test_a_served_checkpoint(uri: str, tiny_models: Path, cache: Path) -> None:
    """Ray makes its settings of the URI where the application is built; a replica reads its own copy."""
    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import PromptError, read_prompt
    from vpo_ray.serve.app import _checked
    from vpo_ray.serve.config import fingerprint
    from vpo_ray.serve.engine import _bring, llm_config

    with pytest.raises(PromptError, match="does not exist"):
        _checked(uri)
    Folder(uri).write("other/config.json", b"{}")
    with pytest.raises(PromptError, match="does not exist"):
        _checked(uri)
    upload(tiny_models / "policy", uri)
    with pytest.raises(PromptError, match="no task prompt"):
        _checked(uri)
    tokenizer: Any = load_tokenizer(uri, read_prompt("builtin:policy"))
    tokenizer.save_pretrained(cache.parent / "tokenizer")
    upload(cache.parent / "tokenizer", uri)
    place, control = _checked(uri)
    assert place == Folder(uri).uri
    assert "<|begin_of_text|>" in control
    made = llm_config(place, Serve())
    made.get_engine_config()
    name = fingerprint(place)
    _bring(made)
    folder = Path(made.get_engine_config().actual_hf_model_id)
    assert folder.parent == cache
    assert (folder / "model.safetensors").exists()
    assert made.engine_kwargs["tokenizer"] == str(folder)
    assert fingerprint(place) == name
    Folder(uri).write("config.json", (folder / "config.json").read_bytes() + b"\n")
    assert fingerprint(place) != name


@pytest.mark.ray
@pytest.mark.slow
def test_every_node_of_an_engine_has_the_model(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes here share the cache; that both have been asked shows by who holds the copy."""
    Folder(uri).write("config.json", b"{}")
    code = f"""
import os, ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from vpo_ray.storage.model_cache import fetch_for_engine
ray.init()
group = placement_group([{{"CPU": 1}}, {{"CPU": 1}}], strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=60)
@ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
class Engine:
    def bring(self):
        path = fetch_for_engine({uri!r})
        use = os.stat(path + ".use").st_ino
        holders = [p for p in os.listdir("/proc") if p.isdigit() and any(held(p, use))]
        return path, len(holders)
def held(process, inode):
    folder = f"/proc/{{process}}/fd"
    try:
        for name in os.listdir(folder):
            yield os.stat(f"{{folder}}/{{name}}").st_ino == inode
    except OSError:
        return
path, holders = ray.get(Engine.remote().bring.remote(), timeout=120)
print(path, holders)
"""
    with simulated(monkeypatch, one={"num_cpus": 1}, two={"num_cpus": 1}) as cluster:
        ended = python(cluster.address, "-c", code, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    path, holders = ended.stdout.split()[-2:]
    assert Path(path).parent == tmp_path / "cache"
    assert int(holders) == 2
