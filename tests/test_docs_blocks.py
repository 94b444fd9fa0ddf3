"""Every block of code in the pages is one that today's code takes: recipes, commands, Python, requests."""

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from sources import parsed

import vpo_ray
from vpo_ray.cli.main import _parser
from vpo_ray.recipe import RecipeError, Serve, load
from vpo_ray.serve.optimize_schema import Optimization, parse_optimize

ROOT = Path(__file__).parents[1]
TINY = ROOT / "jobs/recipes/tiny.yaml"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a page says in words of the rest of such a recipe.
AROUND = {
    "evaluation.md": ["draft={examples: examples.jsonl}"],
    "pairs.md": ["more_rewards={vlm: {kind: vbench, dimensions: [dynamic_degree]}}"],
    "profiles.md": ["profiles={short: {share: 0.2, max_words: 40}}"],
}


def blocks(*kinds: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in BLOCK.finditer(text):
            line = text[: block.start()].count("\n") + 2
            if block[1] in kinds:
                found.append(pytest.param(page.name, block[2], id=f"{page.name}:{line}"))
    assert found
    return found


def commands() -> list[Any]:
    """The lines that call `vpo`, without the variables and the prompt sign before it."""
    call = re.compile(r"(?:\$ )?(?:\S+/)?vpo (.*)")
    lines = [
        (block.id, found[1])
        for block in blocks("", "bash")
        for line in block.values[1].replace("\\\n", " ").splitlines()
        if (found := call.fullmatch(line))
    ]
    return [pytest.param(line, id=f"{where}-{i}") for i, (where, line) in enumerate(lines)]


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_a_recipe_is_read(page: str, text: str) -> None:
    """As a whole, or with each section put into the tiny recipe: in the place of its own, or key by key."""
    sections = yaml.safe_load(text.replace(", …}", "}"))  # "…" stands for the section's other keys
    around = ["evaluate=null", *AROUND.get(page, [])]
    if "rl" in sections:
        around += ["dpo=null", "pair={}"]
    whole = [f"{name}={yaml.safe_dump(section)}" for name, section in sections.items()]
    by_key = [
        f"{name}.{key}={yaml.safe_dump(value)}"
        for name, section in sections.items()
        for key, value in (section.items() if isinstance(section, dict) else ())
    ]
    try:
        load(TINY, [*around, *whole])
    except RecipeError as error:
        if "missing" not in str(error):
            raise
        load(TINY, [*around, *by_key])


@pytest.mark.parametrize("line", commands())
def test_a_command_has_these_options(line: str) -> None:
    _parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_finds_what_it_names(page: str, text: str) -> None:
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vpo_ray"):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("vpo_ray."):
            called = getattr(vpo_ray, ast.unparse(node.func).removeprefix("vpo_ray."))
            given = {word.arg: None for word in node.keywords if word.arg}
            inspect.signature(called).bind(*node.args, **given)


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_an_answer_has_the_fields_of_one(page: str, text: str) -> None:
    shown = json.loads(text)
    told = Optimization.model_validate(shown).model_dump()
    for field, value in shown.items():
        assert field in told
        if isinstance(value, dict):
            assert value.keys() <= told[field].keys(), field


@pytest.mark.parametrize(("page", "text"), blocks("", "bash"))
def test_a_request_is_taken(page: str, text: str) -> None:
    settings = load(TINY, ["serve.videos={store: videos, refine: {}}"]).serve if "effort" in text else Serve()
    for url, body in re.findall(r"^(?:\$ )?curl (\S+).*?-d '(.*?)'$", text, re.MULTILINE | re.DOTALL):
        if url.endswith("/v1/optimize"):
            assert parse_optimize(body.encode(), settings).queries
        else:
            assert json.loads(body)
