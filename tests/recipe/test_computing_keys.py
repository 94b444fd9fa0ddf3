"""What a recipe computes is in its fingerprint, how it runs is not, and its stored form is the recipe."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_recipe import tree

from vpo_ray.recipe import OPERATIONAL, Recipe, Section, differences, load, parse, result_keys
from vpo_ray.recipe.result_keys import OPERATIONAL_PATHS

TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
Path_ = tuple[str, ...]


def full() -> Recipe:
    """A recipe in which every section and every mapping of free keys is filled."""
    phase = {"epochs": 1, "lr": 1e-5, "global_batch": 8, "deepspeed": {"bf16": {"enabled": True}}}
    return parse(
        tree(
            sft={**phase, "data": "sft.jsonl"},
            dpo=phase,
            render={
                "model": "org/video",
                "scheduler_options": {"timestep_spacing": "trailing"},
                "call_options": {"use_dynamic_cfg": True},
                "cache_options": {"threshold": 0.1},
            },
            reward={
                "model": "org/reward",
                "checklist": {"questions": "q.txt", "weights": "w.json", "dimensions": {"alignment": "1-4"}},
            },
        ),
        "full",
    )


def leaves(node: Any, prefix: Path_ = ()) -> Iterator[Path_]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*prefix, key))
    else:
        yield prefix


def changed(node: dict[str, Any], path: Path_) -> dict[str, Any]:
    """A copy whose leaf at `path` has another value."""
    new = copy.deepcopy(node)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = {"changed": old} if isinstance(old, dict | list) else f"changed {old}"
    return new


quick = settings(deadline=None, max_examples=50)
FULL = full().dump()
LEAVES = list(leaves(FULL))


def operational(path: Path_) -> bool:
    return not OPERATIONAL.isdisjoint(path) or path in OPERATIONAL_PATHS


def test_every_computing_key_is_in_the_fingerprint_and_no_operational_one() -> None:
    wrong = [
        path
        for path in LEAVES
        if (result_keys(changed(FULL, path)) == result_keys(FULL)) != operational(path)
    ]
    assert wrong == []


@quick
@given(st.sets(st.sampled_from(LEAVES)))
def test_differences_name_exactly_what_changed(paths: set[Path_]) -> None:
    new = FULL
    for path in paths:
        new = changed(new, path)
    named = {line.partition(": ")[0].removesuffix(".changed") for line in differences(FULL, new)}
    assert named == {".".join(path) for path in paths if not operational(path)}


def test_operational_keys_all_exist() -> None:
    """A renamed key must not leave its old name here, or it would count as computing."""
    known: set[str] = set()
    todo: list[type[Section]] = [Recipe]
    while todo:
        for name, field in todo.pop().model_fields.items():
            known.add(name)
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            todo += [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
    assert known >= OPERATIONAL


@pytest.mark.parametrize(
    "override",
    [
        "seed=8",
        "sample.temperature=0.8",
        "render.steps=4",
        "pair.choice=first",
        "dpo.beta=0.2",
        "judge.model=x/y",
    ],
)
def test_a_recipe_that_computes_something_else_has_another_fingerprint(override: str) -> None:
    before = load(TINY, ["pair.choice=best"])
    assert load(TINY, ["pair.choice=best", override]).fingerprint() != before.fingerprint()


def test_it_can_be_of_one_section() -> None:
    a, b = load(TINY), load(TINY, ["dpo.beta=0.2"])
    assert a.fingerprint() != b.fingerprint()
    assert a.fingerprint("dpo") != b.fingerprint("dpo")
    assert a.fingerprint("sft") == b.fingerprint("sft")


@pytest.mark.parametrize(
    "override",
    [
        "out=elsewhere",
        "render.batch_size=2",
        "render.pool.size=8",
        "render.store=/videos",
        "render.time_limit_s=60",
        "render.offload=model",
        "sample.engine.max_num_seqs=8",
        "sample.engine.batch_size=4",
        "limits.max_error_share=0.9",
    ],
)
def test_a_run_goes_on_with_less_memory_or_more_machines(override: str) -> None:
    assert load(TINY, [override]).fingerprint() == load(TINY).fingerprint()


@pytest.mark.parametrize("recipe", [full(), load(TINY)], ids=["full", "tiny"])
def test_the_stored_recipe_is_the_recipe(recipe: Recipe) -> None:
    stored = yaml.safe_load(yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))
    again = parse(stored, "stored")
    assert again == recipe
    assert differences(stored, again.dump()) == []
    assert again.fingerprint() == recipe.fingerprint()


@quick
@given(
    # PyYAML folds U+0085 where it writes Unicode as it is.
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85"), min_size=1),
    st.floats(1e-12, 1e3),
    st.floats(0, 2),
)
def test_any_text_and_number(name: str, lr: float, temperature: float) -> None:
    dpo = {"epochs": 1, "lr": lr, "global_batch": 1}
    sample = {"k": 1, "temperature": temperature, "max_tokens": 1}
    recipe = parse(tree(name=name, dpo=dpo, sample=sample), "x")
    stored = yaml.safe_load(yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))
    assert parse(stored, "stored") == recipe
