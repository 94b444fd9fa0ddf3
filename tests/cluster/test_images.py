"""The Dockerfiles follow the rules of their linter and ours: pinned, locked, small, not root."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["Dockerfile", "Dockerfile.cpu"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "cluster" / name).read_text("utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(head, rest) for head, _, rest in (line.partition(" ") for line in lines) if head]


@pytest.mark.parametrize("name", FILES)
def test_the_linter_is_content(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, f"cluster/{name}"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_the_ray_that_is_locked(name: str) -> None:
    [(_, base)] = [line for line in instructions(name) if line[0] == "FROM"]
    locked = "cpu.txt" if name.endswith("cpu") else "gpu.txt"
    requirements = (ROOT / "requirements" / locked).read_text("utf-8")
    [version] = re.findall(r"^ray(?:\[.*\])?==([\d.]+)", requirements, re.M)
    kind = "cpu" if name.endswith("cpu") else "gpu"
    assert base == f"rayproject/ray:{version}-py311-{kind}"


@pytest.mark.parametrize("name", FILES)
def test_it_runs_as_a_user_without_rights(name: str) -> None:
    users = [rest for head, rest in instructions(name) if head == "USER"]
    assert users[-1] == "1000:100"


@pytest.mark.parametrize("name", FILES)
def test_everything_that_is_copied_or_installed_is_here_and_locked(name: str) -> None:
    allowed = (ROOT / f"cluster/{name}.dockerignore").read_text("utf-8").splitlines()
    assert "*" in allowed, "nothing goes to the builder that is not named"
    for head, rest in instructions(name):
        assert head != "ADD"
        sources = re.findall(r"source=(\S+?),", rest)
        if head == "COPY":
            sources += [word for word in rest.split()[:-1] if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            patterns = [line[1:] for line in allowed if line.startswith("!")]
            assert any(Path(source).match(pattern) for pattern in patterns), f"{source} is ignored"
        for command in re.findall(r"pip install[^&]*", rest):
            assert "--no-deps" in command, "only what the locked file names is installed"


def test_torch_of_the_cpu_image_is_the_locked_one() -> None:
    [locked] = re.findall(r"^(torch==\S+)", (ROOT / "requirements/cpu.txt").read_text("utf-8"), re.M)
    assert any(locked in rest.split() for head, rest in instructions("Dockerfile.cpu") if head == "RUN")


@pytest.mark.parametrize("name", FILES)
def test_folders_above_a_cache_belong_to_the_user(name: str) -> None:
    """The builder makes those that are not there for root, and an engine's own caches would find no place."""
    text = " ".join(rest for _, rest in instructions(name))
    (made,) = re.findall(r"install -d -o 1000 -g 100 ([^&]*)", text)
    for target in re.findall(r"type=cache,target=(\S+?),", text):
        assert str(Path(target).parent) in made.split()
