"""What the package needs of Ray's private parts is there, and is needed in one module only."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.data import DataContext
from sources import parsed

from vpo_ray.stream import ray_compat

PACKAGE = Path(__file__).parents[2] / "vpo_ray"
# Importing these takes as long as importing vLLM.
ENGINES = {path for path in ray_compat.ADVICE if path.startswith(("ray.llm", "ray.serve.llm"))}
NAMES = {name for path in ray_compat.ADVICE for name in path.partition(":")[2].split(".") if name[0] == "_"}


def check(paths: set[str]) -> None:
    gone = [problem for path in sorted(paths) if (problem := ray_compat.missing(path))]
    assert not gone, "\n".join(gone)


def test_ray_has_the_parts() -> None:
    check(set(ray_compat.ADVICE) - ENGINES)


@pytest.mark.engine
def test_rays_engines_have_the_parts() -> None:
    check(ENGINES)


@pytest.mark.parametrize(
    "path", ["ray._private.nothing:state", "ray._private.state:nothing", "ray.data:Dataset._nothing"]
)
def test_what_is_gone_is_named_with_the_advice(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ray_compat.ADVICE, path, "do without")
    assert str(ray_compat.missing(path)).startswith(f"Ray has no {path} any more: do without")
    with pytest.raises(ray_compat.RayChangedError, match="do without"):
        ray_compat._load(path)


def uses(tree: ast.Module) -> Iterator[str]:
    """The private parts of Ray in a module: imported, reached through `ray`, or by a name of `ADVICE`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ray":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ray."))
        elif isinstance(node, ast.Attribute):
            if (name := ast.unparse(node)).startswith("ray."):
                yield name
            elif node.attr in NAMES:
                yield f"ray._.{node.attr}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in NAMES:
            yield f"ray._.{node.name}"


def private(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("_") for part in parts) or parts[1] in ("core", "experimental")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ray._private import state", True),
        ("import ray\nray._private.worker", True),
        ("from ray.serve.context import _get_global_client", True),
        ("dataset._logical_plan", True),
        ("from ray.core.generated import gcs_pb2", True),
        ("from ray.data import Dataset\nimport ray\nray.data.Dataset", False),
    ],
)
def test_private_parts_are_recognised(code: str, found: bool) -> None:
    assert any(map(private, uses(parsed(code)))) == found


def test_no_other_module_touches_private_parts() -> None:
    found = {
        str(path.relative_to(PACKAGE)): sorted(set(names))
        for path in PACKAGE.rglob("*.py")
        if path != Path(ray_compat.__file__)
        and (names := [name for name in uses(parsed(path.read_text("utf-8"))) if private(name)])
    }
    assert not found


def test_what_is_loaded_has_advice() -> None:
    tree = parsed(Path(ray_compat.__file__).read_text("utf-8"))
    words = [node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    loaded = {ast.literal_eval(word) for word in words if isinstance(word, ast.Constant)}
    assert {path for path in loaded if str(path).startswith("ray.") and ":" in str(path)} <= set(
        ray_compat.ADVICE
    )


@pytest.mark.parametrize(("seconds", "updates"), [(1000.0, 3), (0.0, 33)])
def test_budgets_are_shared_out_once_for_many_tasks_or_after_a_while(
    seconds: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    manager = SimpleNamespace(update_usages=lambda: done.append(1))
    monkeypatch.setattr(ray_compat.Sparing, "SECONDS", seconds)
    ray_compat.Sparing().before_execution_starts(SimpleNamespace(_resource_manager=manager))
    for _ in range(2 * ray_compat.Sparing.CALLS + 1):
        manager.update_usages()
    assert len(done) == updates


def test_an_execution_of_ray_data_calls_sparing() -> None:
    context = DataContext()
    ray_compat.spare_driver(context)
    assert ray_compat.Sparing in context.execution_callback_classes
