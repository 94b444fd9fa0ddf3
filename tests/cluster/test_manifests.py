"""The KubeRay manifests are accepted by the schemas of their kinds, say what we mean, and fit the recipes."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import KustomizeError, build

from vpo_ray.recipe import Recipe, Serve, load
from vpo_ray.stream.placement import ClusterState, Node, pool_shapes, problems, worker_shapes

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster/kuberay"
# KubeRay's custom resource definitions; they lie beside the repository, where they are at all.
SCHEMAS = ROOT.parent / "shared/data/kuberay"
KUBERNETES = "1.36"
FOLDERS = sorted(path.parent.relative_to(KUBERAY).as_posix() for path in KUBERAY.rglob("kustomization.yaml"))
OVERLAYS = [name for name in FOLDERS if name.startswith("overlays/")]
RAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
STAGES = ("sample", "judge", "render", "score")


@cache
def made(name: str) -> list[dict[str, Any]]:
    return build(KUBERAY / name)


def ray_of(name: str) -> dict[str, Any]:
    """The manifest of a Ray kind in a folder."""
    [manifest] = [m for m in made(name) if m["kind"] in RAY]
    return manifest


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The cluster's specification, wherever its kind has it."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def ray_folders(*kinds: str) -> list[str]:
    """The overlays that have a Ray kind, or one of these."""
    return [name for name in OVERLAYS if any(m["kind"] in (kinds or RAY) for m in made(name))]


def templates(name: str) -> list[dict[str, Any]]:
    """Every pod template, head first."""
    spec = cluster_of(ray_of(name))
    return [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def containers(name: str) -> list[dict[str, Any]]:
    specs = [template["spec"] for template in templates(name)]
    return [c for spec in specs for c in [*spec.get("initContainers", []), *spec["containers"]]]


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The definition's schema, in which a field that it does not know is an error."""
    path = SCHEMAS / f"ray.io_{RAY[kind]}.yaml"
    if not path.is_file():
        pytest.skip("the custom resource definitions are not here")
    definition = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    new = {key: strict(value) for key, value in node.items()}
    closed = isinstance(node.get("properties"), dict) and "additionalProperties" not in node
    if closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        new["additionalProperties"] = False
    return new


def check(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in RAY:
        assert manifest["apiVersion"] == "ray.io/v1"
        jsonschema.Draft202012Validator(schema_of(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_manifest_is_valid(name: str) -> None:
    for manifest in made(name):
        check(manifest)


@pytest.mark.parametrize("name", ray_folders())
@pytest.mark.parametrize(
    "wrong",
    [{"gropuName": "x"}, {"maxReplicas": "many"}, {"template": {"spec": {"containers": [{"nam": "x"}]}}}],
)
def test_an_invalid_manifest_is_not_accepted(name: str, wrong: dict[str, Any]) -> None:
    manifest = copy.deepcopy(ray_of(name))
    cluster_of(manifest)["workerGroupSpecs"][0].update(wrong)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_an_unknown_field_of_a_built_in_kind_is_not_accepted() -> None:
    manifest = copy.deepcopy(made("base/shared")[0])
    manifest["spec"]["storage"] = "500Gi"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", FOLDERS)
def test_kustomize_makes_the_same(name: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / name)], capture_output=True, text=True, timeout=60, check=True
    )
    theirs = [json.dumps(m, sort_keys=True) for m in yaml.safe_load_all(done.stdout)]
    assert sorted(theirs) == sorted(json.dumps(m, sort_keys=True) for m in made(name))


@pytest.mark.parametrize(
    ("patch", "told"),
    [
        ("[{op: replace, path: /spec/nothing, value: 1}]", "nothing"),
        ("[{op: remove, path: /spec/resources/limits}]", "limits"),
    ],
)
def test_a_patch_of_a_path_that_is_not_there_is_told(tmp_path: Path, patch: str, told: str) -> None:
    shutil.copy(KUBERAY / "base/shared/storage.yaml", tmp_path)
    tree: dict[str, Any] = {"resources": ["storage.yaml"]}
    tree["patches"] = [{"target": {"kind": "PersistentVolumeClaim"}, "patch": patch}]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    with pytest.raises(KustomizeError, match=told):
        build(tmp_path)
    tree["patches"][0]["target"]["kind"] = "Secret"
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    with pytest.raises(KustomizeError, match="Secret"):
        build(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]", "utf-8")
    with pytest.raises(KustomizeError, match=r"gone\.yaml"):
        build(tmp_path)


def test_every_file_belongs_to_a_kustomization() -> None:
    used = set()
    for path in KUBERAY.rglob("kustomization.yaml"):
        tree = yaml.safe_load(path.read_text("utf-8"))
        named = [
            *tree["resources"],
            *(patch.get("path", "kustomization.yaml") for patch in tree.get("patches", [])),
        ]
        used |= {(path.parent / name).resolve() for name in [*named, "kustomization.yaml"]}
    assert {path.resolve() for path in KUBERAY.rglob("*.yaml")} <= used


def test_the_cluster_of_a_job_is_the_one_that_stays() -> None:
    """Two files hold it, because each kind is to be read alone: they may not drift apart."""
    stays, job = (copy.deepcopy(cluster_of(ray_of(f"base/{kind}"))) for kind in ("cluster", "job"))
    del stays["gcsFaultToleranceOptions"]
    assert stays == job
    gpu = [cluster_of(ray_of(f"overlays/gpu/{kind}")) for kind in ("cluster", "job")]
    assert gpu[0]["workerGroupSpecs"] == gpu[1]["workerGroupSpecs"]


@pytest.mark.parametrize("name", ray_folders())
def test_what_holds_for_every_cluster(name: str) -> None:
    spec = cluster_of(ray_of(name))
    requirements = (ROOT / "requirements/gpu.txt").read_text("utf-8")
    assert re.search(rf"^ray(\[.*\])?=={re.escape(spec['rayVersion'])}\b", requirements, re.M)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for template in templates(name):
        pod = template["spec"]
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "vpo-ray"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["restartPolicy"] == "Never"
    for container in containers(name):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container["resources"].keys()
        _, _, tag = container["image"].rpartition(":")
        assert tag == "0.1.0"
    assert "autoscalerOptions" not in spec or spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert group["idleTimeoutSeconds"] > 0
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_manifest_holds_a_secret(name: str) -> None:
    for manifest in made(name):
        assert manifest["kind"] != "Secret"
        for variable in variables(manifest):
            if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                assert "value" not in variable, variable["name"]


def variables(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from node.get("env", [])
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from variables(value)


def entry(name: str) -> tuple[str, list[str]]:
    """The recipe and the overrides of a RayJob's entry point, which runs in the image's /home/ray/vpo."""
    words = shlex.split(ray_of(name)["spec"]["entrypoint"])
    assert words[:3] == ["python", "jobs/run.py", "--recipe"]
    assert (ROOT / words[1]).is_file()
    assert set(words[4::2]) <= {"--set"}
    return words[3], words[5::2]


def nodes_of(name: str) -> list[Node]:
    """The Ray nodes of a manifest at its largest: Ray takes CPUs and GPUs from a pod's limits."""
    nodes = []
    for group in cluster_of(ray_of(name))["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        amounts = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [Node(amounts, group["labels"])] * group["maxReplicas"]
    return nodes


@pytest.mark.parametrize("name", ray_folders("RayJob"))
def test_every_replica_and_worker_of_the_recipe_has_a_place(name: str) -> None:
    recipe_file, overrides = entry(name)
    recipe = load(ROOT / recipe_file, overrides)
    state = ClusterState(nodes_of(name))
    assert problems(pool_shapes(recipe, STAGES), state) == []
    pools = [recipe.sample.pool, recipe.judge.pool, recipe.render.pool, recipe.reward.pool]
    generate = [node for node in state.nodes if node.labels == {"vpo-group": "generate"}]
    for resource, wanted in (
        ("GPU", sum(p.num_gpus * p.size[0] for p in pools)),
        ("CPU", sum(p.num_cpus * p.size[0] for p in pools)),
    ):
        assert wanted <= sum(node.resources[resource] for node in generate)
    for phase in ("sft", "dpo"):
        assert_trains(recipe, phase, state)


def assert_trains(recipe: Recipe, phase: str, state: ClusterState) -> None:
    shapes = worker_shapes(phase, getattr(recipe, phase))
    assert shapes[0].labels == {"vpo-group": "train"}
    train = ClusterState([node for node in state.nodes if node.labels == {"vpo-group": "train"}])
    assert problems(shapes, train) == []


@pytest.mark.parametrize("name", ray_folders("RayService"))
def test_the_endpoint_is_what_serve_takes(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(ray_of(name)["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "vpo_ray.serve.app:app"
    checkpoint, serve = application.args["checkpoint"], Serve.model_validate(application.args["serve"])
    pool = serve.pool
    [node] = {json.dumps(node.resources): node for node in nodes_of(name)}.values()
    assert pool.num_gpus <= node.resources["GPU"]
    assert pool.num_cpus < node.resources["CPU"], "the ingress needs a tenth of a CPU beside the engine"
    assert pool.size[1] <= len(nodes_of(name))
    mount = containers(name)[-1]["volumeMounts"][0]["mountPath"]
    assert checkpoint.startswith(mount + "/")


def test_spot_nodes_make_and_reserved_nodes_train() -> None:
    for name in ("overlays/gpu/cluster", "overlays/gpu/job", "overlays/gpu-kueue/job"):
        generate, train = (template["spec"] for template in templates(name)[1:])
        required = generate["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        values = [term["matchExpressions"][0]["values"] for term in required["nodeSelectorTerms"]]
        assert sorted(v.lower() for [v] in values) == ["spot", "spot", "spot", "true"]
        assert "affinity" not in train
        assert train["nodeSelector"] == {"vpo-ray/capacity": "reserved"}
        for pod in (generate, train):
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
                "tolerations"
            ]


def test_a_job_cleans_up_and_is_tried_again() -> None:
    spec = ray_of("overlays/gpu/job")["spec"]
    assert spec["backoffLimit"] > 0
    # KubeRay refuses deletion rules together with these two.
    assert not spec.keys() & {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    rules = spec["deletionStrategy"]["deletionRules"]
    assert {rule["condition"]["jobStatus"] for rule in rules} == {"SUCCEEDED", "FAILED"}
    assert all(len(rule["condition"].keys() & {"jobStatus", "jobDeploymentStatus"}) == 1 for rule in rules)


@pytest.mark.parametrize("name", ["overlays/gpu-kueue/cluster", "overlays/gpu-kueue/job"])
def test_kueue_gets_a_suspended_cluster_of_fixed_size(name: str) -> None:
    manifest = ray_of(name)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "vpo"}
    assert manifest["spec"]["suspend"] is True
    spec = cluster_of(manifest)
    assert spec["enableInTreeAutoscaling"] is False
    assert all(group["replicas"] == group["minReplicas"] for group in spec["workerGroupSpecs"])
    if manifest["kind"] == "RayJob":
        assert manifest["spec"]["shutdownAfterJobFinishes"] is True
        assert "deletionStrategy" not in manifest["spec"]


def test_only_the_head_reaches_redis() -> None:
    [policy] = [
        m for m in made("base/shared") if m["metadata"]["name"] == "vpo-redis" and "ingress" in m["spec"]
    ]
    peers = policy["spec"]["ingress"][0]["from"]
    assert peers[0]["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    [redis] = [m for m in made("base/shared") if m["kind"] == "StatefulSet"]
    assert redis["spec"]["template"]["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
    secret = cluster_of(ray_of("base/cluster"))["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    [variable] = list(variables(redis))
    assert variable["valueFrom"] == secret
