"""The JSON schema of recipes is that of the code, takes what a recipe takes, and explains every key."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vpo_ray.cli.main import _parser
from vpo_ray.cli.reference import reference
from vpo_ray.cli.reference_tables import meanings_of_columns, table_schemas
from vpo_ray.recipe import Recipe
from vpo_ray.recipe.json_schema import _meanings, meaning, recipe_schema, recipe_sections, section_paths

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def valid(schema: dict[str, Any], tree: dict[str, Any]) -> list[str]:
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(tree)
    return [".".join(map(str, error.absolute_path)) for error in found]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid_and_name_the_schema_beside_them(
    path: Path, schema: dict[str, Any]
) -> None:
    text = path.read_text("utf-8")
    assert valid(schema, yaml.safe_load(text)) == []
    first = text.splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert (path.parent / first.rpartition("=")[2]).is_file()


def test_what_a_recipe_refuses_is_invalid_and_each_way_to_write_a_key_is_valid(
    schema: dict[str, Any],
) -> None:
    tree = yaml.safe_load((ROOT / "jobs/recipes/tiny.yaml").read_text("utf-8"))
    for change, wrong in (
        ({"stepz": 3}, True),
        ({"steps": 0}, True),
        ({"pool": {"size": 2}}, False),
        ({"pool": {"size": [1, 4]}}, False),
        ({"pool": {"size": "many"}}, True),
    ):
        changed = {**tree, "render": {**tree["render"], **change}}
        assert (valid(schema, changed) != []) == wrong, change
        if not wrong:
            Recipe.model_validate(changed)
    named = {"query": {"kind": "query"}, "mine": {"kind": "file", "path": "p.jsonl"}}
    for policies in (["query", "dpo"], named):
        changed = {**tree, "evaluate": {**tree["evaluate"], "policies": policies}}
        assert valid(schema, changed) == []
        Recipe.model_validate(changed)


def test_every_key_is_explained_and_nothing_else() -> None:
    silent = [
        f"{name}.{key}"
        for name, section in recipe_sections().items()
        for key in section.model_fields
        if not meaning(section, key) and not re.search(rf"\b{key}\b", section.__doc__ or "")
    ]
    assert silent == [], "give each a Field(description=...), or a line in vpo_ray/data/meanings.yaml"
    bases = {base.__name__: base for each in recipe_sections().values() for base in each.__mro__}
    for name, keys in _meanings().items():
        assert keys.keys() <= bases[name].model_fields.keys(), name


def test_a_section_is_found_where_a_recipe_has_it() -> None:
    paths = section_paths()
    assert paths["Policy"] == ["policy"]
    assert {"sample.engine", "judge.engine", "draft.llm.engine", "serve.engine"} <= set(paths["Engine"])
    assert "evaluate.policies.*" in paths["EvaluatedPolicy"]


def test_the_page_and_the_editors_schema_are_those_of_the_code(schema: dict[str, Any]) -> None:
    """`make reference` makes both anew."""
    assert (ROOT / "docs/reference.md").read_text("utf-8") == reference(schema, _parser())
    shipped = ROOT / "vpo_ray/data/recipes/recipe.schema.json"
    assert json.loads(shipped.read_text("utf-8")) == schema


def test_units_and_defaults_are_on_the_page(schema: dict[str, Any]) -> None:
    page = reference(schema, _parser())
    assert "| `timeout_s` | number > 0 | `120` | seconds | of a request |" in page
    assert "| `frames` | whole number > 0 | `49` |  | of a video |" in page
    assert "| 5 | `vpo plan` alone:" in page


def test_every_column_of_every_table_is_explained_once() -> None:
    meanings = meanings_of_columns()
    named = {field.name for schema in table_schemas().values() for field in schema}
    assert named == set(meanings["columns"])
    for table, own in meanings.items():
        if table != "columns":
            assert set(own) <= {"rows", *table_schemas()[table].names}


def test_every_command_and_its_options_are_on_the_page() -> None:
    page = (ROOT / "docs/reference.md").read_text("utf-8")
    for name in ("run", "plan", "evaluate", "serve", "convert-reward"):
        assert f"**`vpo {name}`**" in page
    assert "`--rounds N`" in page
    assert "### pairs/" in page
