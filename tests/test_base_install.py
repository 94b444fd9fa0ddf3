"""What works where only the package's own needs are installed, and what is said of a missing engine."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Runs a command with every module hidden that is not named.
HIDING = """
import sys
known = set(sys.argv[1].split(","))

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in known:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from vpo_ray.cli import main
sys.exit(main(sys.argv[2:]))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these requirements install, here."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        for one in ("", *requirement.extras):
            if (name, one) in seen:
                continue
            seen.add((name, one))
            try:
                needs = requires(name) or []
            except PackageNotFoundError:
                continue
            found.add(name)
            waiting += [(Requirement(text), one) for text in needs]
    return found


@pytest.fixture(scope="module")
def hidden() -> str:
    """Modules of what a base install does not have."""
    there = {*closure(PROJECT["dependencies"]), "vpo-ray", "pip", "setuptools"}
    given = packages_distributions()
    found = {module for module, names in given.items() if not {normal(name) for name in names} & there}
    found -= {path.stem for path in (Path(ray.__file__).parent / "thirdparty_files").iterdir()}
    assert {"torch", "transformers", "vllm", "diffusers", "openai", "pandas"} <= found
    assert not found & {"ray", "pyarrow", "google", "rich", "huggingface_hub"}
    return ",".join(sorted(found))


@pytest.fixture
def vpo(hidden: str, tmp_path: Path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", HIDING, hidden, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_recipe_is_written_planned_and_listed(vpo, tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("a cat\na dog\n", "utf-8")
    words = ["--video", "cogvideox-5b", "--judge", "gpt-4o", "--gpus", "8", "--queries", "queries.txt"]
    done = vpo("init", "ours.yaml", *words)
    assert done.returncode == 0, done.stderr
    planned = vpo("plan", "ours.yaml")
    assert planned.returncode == 5, planned.stderr  # the weights are not here
    assert "wall time" in planned.stdout
    assert vpo("plan", "laptop", "--queries", "100").returncode == 5
    assert vpo("runs", ".").returncode == 0
    assert vpo("schema").returncode == 0
    assert vpo("key", "web").returncode == 0
    assert vpo("--help").returncode == 0


def test_a_submission_reaches_for_the_cluster(vpo, tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("a cat\n", "utf-8")
    done = vpo("submit", "laptop", "--address", "http://127.0.0.1:1", "--set", "queries.path=queries.txt")
    assert done.returncode != 0
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("words", [["tiny", "models"], ["serve", "folder"]])
def test_a_missing_engine_is_named_with_what_installs_it(vpo, words: list[str]) -> None:
    done = vpo(*words)
    assert done.returncode == 1
    assert re.search(r"is not installed.*pip install \"vpo-ray\[(gpu|cpu)\]\"", done.stderr, re.DOTALL)
