"""A plan looks at text models as a run loads them: templates, tokenizers, what an export will need."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import ROOT, recipe

from vpo_ray.plan import PlanError, check_recipe
from vpo_ray.plan import models as plan_models

Change = Callable[[Path], Any]


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**found, **changes}), "utf-8")

    return change


CUT = "{% for m in messages %}{{ m.content[:40] }}{% endfor %}"
BROKEN = {
    "drops": (write("chat_template.jinja", "hello"), ("policy", "judge"), "leaves out what a user says"),
    "cuts": (write("chat_template.jinja", CUT), ("policy", "judge"), "what a user says"),
    "no Jinja": (write("chat_template.jinja", "{% for %}"), ("policy", "judge"), "TemplateSyntaxError"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), ("policy", "judge"), "no chat template"),
    "no tokenizer": (write("tokenizer.json", "{}"), ("policy", "judge"), "its tokenizer does not load"),
    "generation": (write("generation_config.json", "{"), ("policy",), "generation_config.json does not load"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("policy",),
        "is quantised",
    ),
    "T5": (
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        ("policy",),
        "is not a causal language model but a t5 T5ForConditionalGeneration",
    ),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        ("policy",),
        "is not a causal language model but a llama LlamaForSequenceClassification",
    ),
    "unknown": (
        config(model_type="brandnew9"),
        ("policy",),
        "its config.json does not load: The checkpoint you are trying to load has model type `brandnew9`",
    ),
    "own code": (
        config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}),
        ("policy",),
        "own code brings its own code: write trust_remote_code: true beside its name",
    ),
    "embeddings": (
        config(vocab_size=1000),
        ("policy", "judge"),
        "a prompt has the token '<|eot_id|>' (1032), and its config.json makes 1000 embeddings",
    ),
}


@pytest.fixture(scope="module")
def broken(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is told of each broken folder as policy and judge; all are looked at in one process."""
    from vpo_ray.recipe import load

    folder = tmp_path_factory.mktemp("broken")
    code = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from vpo_ray.plan.models import _problems, asks\n"
        "from vpo_ray.recipe import parse\n"
        "def told(tree):\n"
        "    return [line for ask in asks(parse(tree, 'recipe')) for line in _problems(ask)]\n"
        "print(json.dumps({name: told(tree) for name, tree in json.load(sys.stdin).items()}))\n"
    )
    trees = {}
    for name, (change, _, _) in BROKEN.items():
        shutil.copytree(tiny_models / "policy", folder / name)
        change(folder / name)
        models = [f"policy.model={folder / name}", f"judge.model={folder / name}"]
        trees[name] = load(ROOT / "jobs/recipes/tiny.yaml", models).dump()
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(trees),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_a_run_could_not_use_is_told(name: str, broken: dict[str, list[str]]) -> None:
    _, sections, says = BROKEN[name]
    assert [line.partition(": ")[0] for line in broken[name]] == [f"{section}.model" for section in sections]
    assert all(says in line for line in broken[name])


def test_the_check_looks_at_them_and_imports_no_torch(
    tiny: dict[str, Any], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/json.py").write_text("raise SystemExit('a file of the working directory')", "utf-8")
    monkeypatch.chdir(tmp_path / "work")
    model = tmp_path / "policy"
    shutil.copytree(tiny_models / "policy", model)
    (model / "chat_template.jinja").write_text("hello", "utf-8")
    with pytest.raises(PlanError, match=r"1 problem\(s\)\n  policy.model: .* leaves out what a user says"):
        check_recipe(recipe(tiny, policy__model=model))
    code = (
        "import sys\nimport vpo_ray.plan\n"
        "sys.exit(', '.join({'torch', 'transformers', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_where_nothing_can_be_looked_at_the_plan_goes_on(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan_models._looked.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    check_recipe(recipe(tiny))
    assert "could not be looked at here" in caplog.text
    plan_models._looked.cache_clear()


def test_rows_of_sft_data_are_read(tiny: dict[str, Any], tmp_path: Path) -> None:
    row = '{"query": "a", "prompt": "A paper lantern.\u2028It drifts."}\n'
    data = tmp_path / "s.jsonl"
    for text, says in {
        row + '{"query": "a"}\n': "row 2 needs a text `query` and a text `prompt`",
        row + "{\n": "row 2 cannot be read: not JSON",
        "": "it holds no rows",
    }.items():
        data.write_text(text, "utf-8")
        for name in (data, data.as_uri()):
            with pytest.raises(PlanError) as caught:
                check_recipe(recipe(tiny, sft__data=name))
            told = str(caught.value)
            assert f"sft.data {data}: {says}" in told or f"sft.data {name}: {says}" in told
    data.write_text(row, "utf-8")
    check_recipe(recipe(tiny, sft__data=data))
    check_recipe(recipe(tiny, sft__data=f"{tmp_path}/*.jsonl"))


def test_lists_of_words_and_keys_are_read(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes(b"one\ncaf\xe9\n")
    (tmp_path / "label.txt").write_text("no slot", "utf-8")
    with pytest.raises(PlanError) as caught:
        check_recipe(
            recipe(
                tiny,
                queries__rules__keywords=tmp_path / "words",
                queries__unsafe_judge="true",
                queries__unsafe_prompt=tmp_path / "label.txt",
                serve__safety__keywords=tmp_path / "words",
                serve__safety__query="refuse",
                serve__keys=tmp_path / "words",
            )
        )
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == [
        "queries.unsafe_prompt",
        "queries.rules.keywords",
        "serve.keys",
        "serve.safety.keywords",
    ]
    check_recipe(recipe(tiny, serve__keys="/no/such/file/here"))
