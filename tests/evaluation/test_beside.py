"""An evaluation asks two models at a time where the cluster has room for both, and one where it has not."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.evaluation import evaluate as evaluation
from vpo_ray.loop.opening import open_run
from vpo_ray.recipe import load
from vpo_ray.records import Row

pytestmark = pytest.mark.ray

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")


def asked(tmp_path: Path, tiny_models: Path, cpus: float, ask: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The prompts of two models, one of them under two names, and of the query itself."""
    (tmp_path / "set.txt").write_text("rain\na cat", "utf-8")
    shutil.copytree(tiny_models / "policy", tmp_path / "other")
    config = tmp_path / "other" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "max_length": 77}), "utf-8")
    one, other = (
        {"kind": "checkpoint", "path": str(p)} for p in (tiny_models / "policy", tmp_path / "other")
    )
    policies = {"query": {"kind": "query"}, "one": one, "again": one, "other": other}
    made = {"policies": policies, "sets": {"two": {"path": f"{tmp_path}/set.txt"}}, "videos": False}
    sets = [f"out={tmp_path}/run", "sft=null", "dpo=null", f"evaluate={json.dumps(made)}"]
    recipe = load(TINY, [*sets, f"sample.pool.num_cpus={cpus}"])
    monkeypatch.setattr(evaluation, "prompts_of", ask)
    return evaluation._Evaluating(recipe, open_run(recipe), False, ())._prompts()


def test_two_models_are_asked_beside_each_other_and_one_models_names_in_turn(
    tmp_path: Path, tiny_models: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, lock, under_way = threading.Barrier(2), threading.Lock(), set[str]()

    def ask(rival: Any, *_: Any) -> dict[str, Row]:
        with lock:
            assert rival.identity not in under_way, "two drivers of one run directory"
            under_way.add(rival.identity)
        if rival.name in ("one", "other"):
            both.wait(timeout=30)
        with lock:
            under_way.remove(rival.identity)
        return {rival.name: {}}

    made = asked(tmp_path, tiny_models, 0.5, ask, monkeypatch)
    assert made == {(name, 0): {name: {}} for name in ("query", "one", "again", "other")}


def test_without_room_for_both_they_are_asked_in_turn(
    tmp_path: Path, tiny_models: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(rival: Any, *_: Any) -> dict[str, Row]:
        return {"thread": {"name": threading.current_thread().name}}

    made = asked(tmp_path, tiny_models, 3, ask, monkeypatch)
    assert {rows["thread"]["name"] for rows in made.values()} == {threading.current_thread().name}


def test_what_one_model_fails_with_ends_the_evaluation_behind_the_other(
    tmp_path: Path, tiny_models: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def ask(rival: Any, *_: Any) -> dict[str, Row]:
        if rival.name == "other":
            raise RuntimeError("no such weights")
        done.append(rival.name)
        return {}

    with pytest.raises(RuntimeError, match="no such weights"):
        asked(tmp_path, tiny_models, 0.5, ask, monkeypatch)
    assert done == ["query", "one", "again"]
