"""What the commands that need no engine import: how soon they answer hangs on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from vpo_ray.recipe.plugins import BUILT_IN

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))

# Each takes longer to import than `vpo plan` takes for all else.
SLOW = {
    "pandas",
    "pyarrow.dataset",
    "jsonschema",
    "openai",
    "aiohttp",
    "fsspec",
    "ray",
    "torch",
    "transformers",
}


def modules_after(code: str, folder: Path = ROOT) -> set[str]:
    """The modules that a new process has when it ran this."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('modules', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["submit", "--help"]])
def test_help_imports_no_package(words: list[str]) -> None:
    found = modules_after(f"from vpo_ray.cli import main; main({words})")
    assert found & {*SLOW, "pydantic", "numpy", "pyarrow", "yaml"} == set()
    ours = {name for name in found if name.startswith("vpo_ray.") and ".cli" not in name}
    known = {"vpo_ray.stages", "vpo_ray.stages.spec", "vpo_ray.terminal"}
    assert ours == known, "the list of stages and the terminal, and nothing else"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_plan_imports_nothing_slow(recipe: Path, tmp_path: Path) -> None:
    """To say which files are missing. Reading queries takes pyarrow's arrays, which import pandas."""
    found = modules_after(f"from vpo_ray.cli import main; main(['plan', {str(recipe)!r}])", tmp_path)
    assert "vpo_ray.plan.check" in found
    assert found & SLOW == set()


def test_a_recipe_with_the_packages_own_plugins_imports_nothing_slow(tmp_path: Path) -> None:
    targets = [target for group in BUILT_IN.values() for target in group.values()]
    assert targets
    loads = "; ".join(f"load_builder({target!r})" for target in targets)
    found = modules_after(f"from vpo_ray.recipe.plugins import load_builder; {loads}", tmp_path)
    assert "vpo_ray.engines.reward.mps" in found
    assert found & SLOW == set()


def test_the_package_is_imported_at_once_and_sets_no_logger() -> None:
    found = modules_after("import vpo_ray, logging; assert not logging.Logger.manager.loggerDict")
    assert {name for name in found if name.startswith("vpo_ray.")} == set()
    assert found & {*SLOW, "pydantic", "numpy", "pyarrow", "yaml"} == set()
