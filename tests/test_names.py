"""A name means one thing in the whole package: no two classes, and no two public functions, share one."""

import ast
from collections import Counter
from pathlib import Path

from sources import parsed

PACKAGE = Path(__file__).parents[1] / "vpo_ray"
# The Python API has functions of the names of those that it calls.
MODULES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "api.py"]
TREES = [parsed(path.read_text("utf-8")) for path in MODULES]

# Functions that modules of one kind have alike, always called with their module's name.
PER_MODULE = {
    "add", "run",  # of a command
    "build", "prepare",  # of an engine
    "facts", "make",  # of a stage
    "train",  # of a part of the world, and of a phase
}  # fmt: skip


def twice(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def test_every_class_has_a_name_of_its_own() -> None:
    found = [node.name for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not twice(found)


def test_every_public_function_has_a_name_of_its_own() -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [node.name for tree in TREES for node in tree.body if isinstance(node, kinds)]
    assert not twice([name for name in found if not name.startswith("_")]) - PER_MODULE


def test_every_test_module_has_a_name_of_its_own() -> None:
    # pytest imports them by their name alone.
    assert not twice([path.name for path in Path(__file__).parent.rglob("test_*.py")])


def test_no_file_is_longer_than_500_lines() -> None:
    root = PACKAGE.parent
    files = [
        path
        for part in ("vpo_ray", "tests", "jobs", "benchmarks", "docs")
        for path in (root / part).rglob("*.py")
    ]
    assert [str(path) for path in files if len(path.read_text("utf-8").splitlines()) > 500] == []
