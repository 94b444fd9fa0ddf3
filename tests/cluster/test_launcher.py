"""The cluster launcher's files pass Ray's own validation, and their nodes take the recipes' pools."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vpo_ray.recipe import load
from vpo_ray.stream.placement import ClusterState, Node, pool_shapes, problems, worker_shapes

ROOT = Path(__file__).parents[2]
STAGES = ("sample", "judge", "render", "score")
GENERATE = "{vpo-group: generate}"


def config(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"cluster/launcher-{cloud}.yaml").read_text("utf-8"))


def prepared(tree: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it calls a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(copy.deepcopy(tree))
    validate_config(made)
    return made


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_takes_the_file(cloud: str) -> None:
    made = prepared(config(cloud))
    assert made["provider"]["type"] == cloud
    assert made["docker"]["image"].endswith(":0.1.0")
    for name, kind in made["available_node_types"].items():
        assert kind["max_workers"] <= made["max_workers"], name
    # The defaults would install another Ray, and open the dashboard to the world.
    assert made["setup_commands"] == []
    assert all("0.0.0.0" not in command for command in made["head_start_ray_commands"])


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("wrong", [{"max_workerz": 3}, {"max_workers": "nine"}, {"head_node_type": "gone"}])
def test_ray_refuses_a_wrong_one(cloud: str, wrong: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared({**config(cloud), **wrong})


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_nodes_take_the_recipes(cloud: str) -> None:
    kinds = config(cloud)["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0, "GPU": 0}
    nodes = {
        name: [Node(kind["resources"], kind["labels"])] * kind["max_workers"]
        for name, kind in kinds.items()
        if name != "head"
    }
    pools = [f"{stage}.pool.labels={GENERATE}" for stage in ("sample", "judge", "render", "reward")]
    recipe = load(
        ROOT / "jobs/recipes/vpo_cogvideox_2b.yaml",
        [*pools, "sft.labels={vpo-group: train}", "dpo.labels={vpo-group: train}"],
    )
    assert problems(pool_shapes(recipe, STAGES), ClusterState(nodes["generate"])) == []
    replicas = sum(p.pool.size[0] for p in (recipe.sample, recipe.judge, recipe.render, recipe.reward))
    assert replicas <= len(nodes["generate"])
    for phase in ("sft", "dpo"):
        assert problems(worker_shapes(phase, getattr(recipe, phase)), ClusterState(nodes["train"])) == []
