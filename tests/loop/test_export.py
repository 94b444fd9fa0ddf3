"""What other trainers get: golden files by format, and TRL trains on its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vpo_ray.cli import main
from vpo_ray.loop.export import FORMATS, ExportError, export
from vpo_ray.recipe import Recipe, load
from vpo_ray.records import query_id
from vpo_ray.storage.run_dir import RunDir

TINY = str(Path(__file__).parents[2] / "jobs/recipes/tiny.yaml")
GOLDEN = Path(__file__).parent / "golden_export"
TASK = "Rewrite it.\nRequest: {query}\nPrompt:"


def pair(number: int, query: str, kind: str = "text") -> dict[str, Any]:
    return {
        "pair_id": str(number), "query_id": query_id(query), "query": query, "kind": kind,
        "chosen": f"A calm scene of {query}.", "rejected": f"{query} é\n😀",
        "chosen_id": "a", "rejected_id": "b",
    }  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: Path) -> Recipe:
    (tmp_path / "task.txt").write_text(TASK, "utf-8")
    sets = [f"out={tmp_path / 'run'}", f"policy.model={tiny_models / 'policy'}"]
    return load(TINY, [*sets, f"policy.task_prompt={tmp_path / 'task.txt'}"])


@pytest.fixture
def run(recipe: Recipe) -> RunDir:
    run = RunDir(recipe.out)
    texts = {"a cat": "A grey cat.", 'say "hi" \\n <|eot_id|>': "Lines\nof 中文 <|start_header_id|>."}
    rows = [{"query_id": query_id(q), "query": q, "prompt": p} for q, p in texts.items()]
    run.table("sft").append(rows)
    run.table("pairs").append([pair(2, "a <|eot_id|> dog"), pair(1, "the {query}", "video")])
    return run


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_the_golden_ones(format: str, recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    assert export(recipe, run, format, str(tmp_path / "to")) == {"sft.jsonl": 2, "preference.jsonl": 2}
    if os.environ.get("WRITE_GOLDEN"):
        export(recipe, run, format, str(GOLDEN / format))
    assert files(tmp_path / "to") == files(GOLDEN / format)


@pytest.mark.parametrize("format", FORMATS)
def test_no_text_becomes_a_control_token_of_another_trainer(
    format: str, recipe: Recipe, run: RunDir, tmp_path: Path
) -> None:
    export(recipe, run, format, str(tmp_path / "to"))
    text = "".join(files(tmp_path / "to").values())
    assert ("<|eot_id|>" in text) == (format == "openai"), "OpenAI's service reads it as text"
    assert "eot_id" in text


def test_the_query_alone_for_a_model_that_holds_the_task_prompt(
    recipe: Recipe, run: RunDir, tmp_path: Path
) -> None:
    export(recipe, run, "openai", str(tmp_path / "to"), bare=True)
    lines = [json.loads(line) for line in (tmp_path / "to/sft.jsonl").read_text("utf-8").splitlines()]
    assert {line["messages"][0]["content"] for line in lines} == {"a cat", 'say "hi" \\n <|eot_id|>'}


def test_only_what_a_run_has_is_written(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(recipe.out)
    with pytest.raises(ExportError, match=r"neither SFT data .* nor pairs"):
        export(recipe, run, "trl", str(tmp_path / "to"))
    run.table("pairs").append([pair(1, "a cat")])
    assert export(recipe, run, "llamafactory", str(tmp_path / "to")) == {"preference.jsonl": 1}
    assert list(json.loads((tmp_path / "to/dataset_info.json").read_text("utf-8"))) == ["vpo_preference"]
    run.table("drafts").append(
        [{"draft_id": "1", "query_id": "q", "query": "a cat", "seed": 1, "target": "A cat."}]
    )
    assert export(recipe, run, "openai", str(tmp_path / "to"))["sft.jsonl"] == 1


def test_the_command(recipe: Recipe, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", f"policy.model={recipe.policy.model}"]
    to = str(tmp_path / "to")
    assert main(["export", TINY, "--out", recipe.out, *sets, "--format", "trl", "--to", to]) == 0
    assert capsys.readouterr().out == f"{to}/sft.jsonl: 2 rows\n{to}/preference.jsonl: 2 rows\n"
    assert main(["export", TINY, "--out", str(tmp_path / "none"), "--format", "trl", "--to", "x"]) == 2
    assert "neither SFT data" in capsys.readouterr().err


@pytest.mark.engine
def test_trl_trains_on_both(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    export(recipe, run, "trl", str(tmp_path / "to"))
    tokenizer = AutoTokenizer.from_pretrained(recipe.policy.model)
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "trl"), "max_steps": 1, "per_device_train_batch_size": 2,
        "use_cpu": True, "report_to": [], "bf16": False, "max_length": None, "logging_steps": 1,
    }  # fmt: skip
    for file, trainer_class, config in (
        ("sft.jsonl", SFTTrainer, SFTConfig(completion_only_loss=True, **options)),
        ("preference.jsonl", DPOTrainer, DPOConfig(**options)),
    ):
        rows = load_dataset(
            "json", data_files=str(tmp_path / "to" / file), split="train", cache_dir=str(tmp_path / "cache")
        )
        model = AutoModelForCausalLM.from_pretrained(recipe.policy.model)
        trainer = trainer_class(model, args=config, train_dataset=rows, processing_class=tokenizer)
        loss = trainer.train().training_loss
        assert loss > 0
        # The answer is learnt to its end, behind the model's own template.
        ids = trainer.train_dataset[0]
        text = tokenizer.decode(ids.get("input_ids") or ids["prompt_ids"])
        assert "Rewrite it." in text
        assert text.count("<|start_header_id|>user") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_other_data_sets_stay_listed(encoding: str, recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "to/dataset_info.json"
    path.parent.mkdir()
    others = {
        "z": {"file_name": "z.json"},
        "identity": {"file_name": "身份.json", "columns": {"b": 1, "a": 2}},
    }
    path.write_bytes(json.dumps({**others, "vpo_sft": {"file_name": "old.jsonl"}}).encode(encoding))
    export(recipe, run, "llamafactory", str(path.parent))
    listed = json.loads(path.read_text("utf-8"))
    ours = json.loads((GOLDEN / "llamafactory/dataset_info.json").read_text("utf-8"))
    assert listed == {**others, **ours}
    assert list(listed)[:2] == ["z", "identity"], "in their order"
    assert "身份" in path.read_text("utf-8")
    before = path.read_bytes()
    export(recipe, run, "llamafactory", str(path.parent))
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b"[]", b'{"a": ', b"caf\xe9", b"", b'"x"'])
def test_a_list_of_data_sets_that_is_none_stays_and_nothing_is_written(
    text: bytes, recipe: Recipe, run: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "to/dataset_info.json"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ExportError, match=r"dataset_info\.json .*is left as it is"):
        export(recipe, run, "llamafactory", str(path.parent))
    assert [file.read_bytes() for file in path.parent.iterdir()] == [text]


@pytest.mark.parametrize(
    "text",
    ['{"query": "a cat", "prompt": "A grey cat."}\n', '{"messages": [{"role": "assistant"}]}\n', "no JSON"],
)
@pytest.mark.parametrize("name", ["sft.jsonl", "preference.jsonl"])
def test_data_of_somebody_else_is_not_overwritten(
    name: str, text: str, recipe: Recipe, run: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "to" / name
    path.parent.mkdir()
    path.write_text(text, "utf-8")
    with pytest.raises(ExportError, match=rf"{name} is there"):
        export(recipe, run, "trl", str(path.parent))
    assert [file.read_text("utf-8") for file in path.parent.iterdir()] == [text]


def test_an_export_is_replaced_by_a_later_one_of_its_run(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    to = tmp_path / "to"
    for format in FORMATS:
        for bare in (True, False):
            export(recipe, run, format, str(to), bare)
    run.table("sft").append([{"query_id": query_id("a dog"), "query": "a dog", "prompt": "A dog."}])
    assert export(recipe, run, "trl", str(to))["sft.jsonl"] == 3
    assert not any(
        path.name not in ("sft.jsonl", "preference.jsonl", "dataset_info.json") for path in to.iterdir()
    )
