"""Imports of the package go down its layers only, and in no circle, wherever in a module they stand."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from sources import parsed

PACKAGE = Path(__file__).parents[1] / "vpo_ray"

# From the top down. Those of one line may import each other, without a circle.
LAYERS = (
    {"cli"},
    {"", "api"},  # the Python API
    {"report", "plan", "world"},
    {"evaluation"},
    {"loop"},
    {"train", "serve"},
    {"stream"},
    {"stages"},
    {"engines"},
    {"storage"},
    {"recipe", "records", "prompts", "flags", "keywords", "metrics", "versions", "lifetime", "terminal"},
    {"files"},
)
RANK = {name: len(LAYERS) - number for number, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, ast.Module]:
    """The package's modules by their dotted names, parsed."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parsed(path.read_text("utf-8"))
    return found


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it: for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", str(node.module))
                yield from [name for name in names if name in known][:1]


TREES = modules()
EDGES = {name: set(imported(tree, set(TREES))) for name, tree in TREES.items()}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_layer() -> None:
    assert {part(name) for name in TREES} == set(RANK)


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_import_climbs(name: str) -> None:
    climbing = [other for other in EDGES[name] if RANK.get(part(other), 99) > RANK[part(name)]]
    assert not climbing, f"{name} imports from above: {climbing}"


def test_no_imports_close_a_circle() -> None:
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_answers_http_does_not_import_vllm() -> None:
    """It takes seconds, and only the engine's replicas need it."""
    code = (
        "import sys, vpo_ray.serve.app, vpo_ray.serve.deploy, vpo_ray.serve.ingress\n"
        "print([name for name in ('vllm', 'ray.serve.llm') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
