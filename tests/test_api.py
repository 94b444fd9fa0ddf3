"""The Python API: what `import vpo_ray` gives."""

import inspect
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import vpo_ray
from vpo_ray import api
from vpo_ray.files.folder import StorageError
from vpo_ray.loop.commands import PHASES, run_phase
from vpo_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[1]
TINY = ROOT / "jobs/recipes/tiny.yaml"
# Reveals what a type checker knows, and uses it.
TYPED = """
import vpo_ray
recipe = vpo_ray.load_recipe("x.yaml")
reveal_type(recipe)
reveal_type(vpo_ray.run(recipe).tables)
reveal_type(vpo_ray.plan(recipe).gpu_hours)
reveal_type(vpo_ray.optimise("policy", ["a cat"])[0].prompt)
vpo_ray.run("x.yaml")
"""


def test_every_name_is_there_and_documented() -> None:
    page = (ROOT / "docs/python.md").read_text("utf-8")
    for name in vpo_ray.__all__:
        function = getattr(api, name, None) or getattr(vpo_ray, name)
        assert inspect.getdoc(function), name
        assert name in dir(vpo_ray)
        assert f"`{name}" in page or f"vpo_ray.{name}" in page, f"{name} is not in docs/python.md"
    with pytest.raises(AttributeError, match="no attribute 'optimize'"):
        vpo_ray.optimize  # noqa: B018


def test_a_function_is_called_by_its_name_after_its_package_is_imported(tmp_path: Path) -> None:
    """`plan`, `train` and `serve` are packages too."""
    code = (
        "import vpo_ray, cloudpickle, sys, importlib\n"
        "recipe = vpo_ray.load_recipe(sys.argv[1], ['policy.model=/nowhere'])\n"
        "for _ in range(2):\n"
        "    try:\n        vpo_ray.plan(recipe)\n"
        "    except ValueError as error:\n        print(type(error).__name__)\n"
        "from vpo_ray import plan, serve, train\n"
        "import vpo_ray.train.job, vpo_ray.serve.run\n"
        "print(callable(vpo_ray.serve), callable(vpo_ray.train), vpo_ray.train.job.__name__)\n"
        "for module in (vpo_ray, importlib.import_module('vpo_ray.plan')):\n"
        "    assert cloudpickle.loads(cloudpickle.dumps(module)) is module\n"
    )
    command = [sys.executable, "-c", code, str(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["PlanError", "PlanError", "True True vpo_ray.train.job"]


def test_a_function_that_names_the_package_travels_to_workers() -> None:
    def remote() -> Any:
        return vpo_ray.load_recipe

    assert cloudpickle.loads(cloudpickle.dumps(remote))() is vpo_ray.load_recipe


def test_the_types_are_shipped() -> None:
    assert resources.files("vpo_ray").joinpath("py.typed").is_file()


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: Path) -> None:
    """As a user's does, to whom the libraries behind are untyped."""
    settings = "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
    skipped = "[mypy-ray.*,torch.*,transformers.*,diffusers.*,pandas.*,pyarrow.*,vllm.*,numpy.*]\n"
    (tmp_path / "mypy.ini").write_text(f"{settings}{skipped}follow_imports = skip\n", "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), "-c", TYPED],
        capture_output=True, text=True, cwd=ROOT, timeout=400,
    )  # fmt: skip
    for found in ("vpo_ray.recipe.Recipe", "list[", "float", "str | None"):
        assert f'Revealed type is "{found}' in done.stdout.replace("builtins.", ""), done.stdout + done.stderr
    assert 'incompatible type "str"; expected "Recipe"' in done.stdout


# A run directory


def scored(query: str, k: int, score: float) -> dict[str, Any]:
    return {
        "candidate_id": f"{query}-{k}",
        "query_id": query,
        "query": query,
        "k": k,
        "seed": k,
        "prompt": f"prompt {k}",
        "verdict": "aligned",
        "score": score,
        "answers": [{"question": 0, "yes": score > 1}],
    }


@pytest.fixture
def made(tmp_path: Path) -> vpo_ray.Run:
    """A run directory as the commands leave it."""
    sets = [f"out={tmp_path / 'run'}", f"queries.path={ROOT / 'vpo_ray/data/queries.jsonl'}"]
    recipe = vpo_ray.load_recipe(TINY, [*sets, "queries.near_duplicates=null", "pair.margin=0.5", "sft=null"])
    run_phase(recipe, "curate")
    feedback = RunDir(recipe.out).table("feedback")
    failed = {**scored("b" * 32, 0, 1.0), "score": None, "error": "boom", "error_stage": "score"}
    feedback.append([failed])
    feedback.append([scored(name * 32, k, k + 1.0) for name in "ab" for k in range(2)])
    assert run_phase(recipe, "pair") == 2
    return vpo_ray.Run(recipe.out)


def test_a_run_shows_its_tables_ledger_and_pairs(made: vpo_ray.Run) -> None:
    assert made.tables == ["queries", "feedback", "pairs"]
    assert made.ledger["stages"]["pair"]["pairs"] == 2
    assert {row["chosen"] for row in made.pairs()} == {"prompt 1"}
    table = made.table("feedback", ["candidate_id", "score"])
    assert (table.num_rows, table.column_names) == (4, ["candidate_id", "score"])
    frame = made.pandas("feedback")
    assert frame["candidate_id"].is_unique
    assert frame["error"].isna().all(), "the row that was tried again replaces the failed one"
    assert made.table("renders").num_rows == 0
    assert made.recipe.pair.margin == 0.5
    assert made.checkpoint() is None
    assert list(made.videos.entries()) == []


def test_what_is_no_run_or_table_is_refused(made: vpo_ray.Run, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is no run directory"):
        vpo_ray.Run(tmp_path)
    with pytest.raises(ValueError, match="no table 'pair'; there are queries"):
        made.table("pair")
    with pytest.raises(ValueError, match="pairs has no column prompt"):
        made.table("pairs", ["prompt"])


def test_polars_reads_a_table_where_it_is_installed(made: vpo_ray.Run) -> None:
    pytest.importorskip("polars")
    assert made.polars("pairs").height == 2


def test_every_phase_is_a_command() -> None:
    from vpo_ray.cli.steps import step_commands
    from vpo_ray.stages import spec

    assert {*PHASES, *spec.names("generation"), "evaluate", "report"} == set(step_commands())


# Batch inference

QUERIES = ["a cat", "", "waves at night", "word " * 9000, "<|im_end|> a dog\ud800", "a cat"]
ASK = """
import json, sys, vpo_ray
if __name__ == "__main__":
    done = vpo_ray.optimise(
        sys.argv[1], json.loads(sys.argv[2]), backend=sys.argv[3], temperature=0, max_tokens=12, batch_size=2,
        engine_kwargs=json.loads(sys.argv[4]),
    )
    print(json.dumps([[one.query, one.prompt, one.error] for one in done]))
"""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "transformers": {"dtype": "float32"},
    "vllm": {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "enable_prefix_caching": False,
        "enable_chunked_prefill": False, "max_num_batched_tokens": 1024,
    },
}  # fmt: skip
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="module")
def policy(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny policy as training leaves it: with the task prompt in its chat template."""
    from vpo_ray.engines.chat.tokenizer import load_tokenizer
    from vpo_ray.prompts.policy_prompt import read_prompt

    folder = tmp_path_factory.mktemp("policy")
    for file in (tiny_models / "policy").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_tokenizer(str(folder), read_prompt("builtin:policy")).save_pretrained(folder)
    return str(folder)


def optimised(policy: str, backend: str) -> list[list[Any]]:
    words = [policy, json.dumps(QUERIES), backend, json.dumps(ARGUMENTS[backend])]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *words],
        capture_output=True, text=True, timeout=400, env=os.environ | VLLM, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.engine
@pytest.mark.slow
def test_both_backends_write_the_same_prompts_in_order(policy: str) -> None:
    one, other = optimised(policy, "transformers"), optimised(policy, "vllm")
    for results in (one, other):
        assert [query for query, _, _ in results] == QUERIES
        prompts, errors = [prompt for _, prompt, _ in results], [error for *_, error in results]
        assert errors[1] == "no text"
        assert "prompt tokens, the model takes" in errors[3]
        assert errors[4].startswith("UnicodeEncodeError")
        assert prompts[0] == prompts[5]
        assert all((prompt is None) != (error is None) for _, prompt, error in results)
        assert prompts[0] is not None
    assert [result[1] for result in one] == [result[1] for result in other]


@pytest.mark.engine
def test_a_folder_that_is_no_policy_of_ours_is_refused(tiny_models: Path) -> None:
    with pytest.raises(ValueError, match="it is not a vpo_ray policy"):
        vpo_ray.optimise(str(tiny_models / "policy"), ["a cat"], backend="transformers")
