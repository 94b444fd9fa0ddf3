"""What an export needs is tried before the first step, and a failure that comes again is not tried again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_data import FACTS, TASK_PROMPT, run, settings, sft_rows

from vpo_ray.engines.chat.tokenizer import load_tokenizer
from vpo_ray.files.folder import Folder
from vpo_ray.recipe import Train
from vpo_ray.train import TrainError, failures
from vpo_ray.train.examples import end_of_turn
from vpo_ray.train.rehearsal import check_room, rehearse
from vpo_ray.train.save_pretrained import export_policy

pytestmark = pytest.mark.engine

Edit = Callable[..., Path]


@pytest.fixture
def policy(tiny_models: Path, tmp_path: Path) -> Edit:
    """Makes a copy of the tiny policy with keys of its JSON files replaced (None: removed)."""

    def make(**files: dict[str, Any]) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_models / "policy", folder)
        for name, changes in files.items():
            path = folder / f"{name}.json"
            tree = json.loads(path.read_text("utf-8")) | changes
            path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}), "utf-8")
        return folder

    return make


def job_of(folder: Path, tokenizer: Any, chosen: Train, out: Path | str = "") -> Any:
    return SimpleNamespace(
        settings=chosen,
        model=str(folder),
        revision=None,
        trust_remote_code=False,
        tokenizer=tokenizer,
        end=end_of_turn(tokenizer, TASK_PROMPT),
        out=str(out),
    )


def rehearsed(folder: Path, **changes: Any) -> Any:
    """Rehearses, and gives back the tokenizer."""
    tokenizer = load_tokenizer(str(folder), TASK_PROMPT)
    rehearse(job_of(folder, tokenizer, settings(**changes)))
    return tokenizer


def exported(folder: Path, out: Path, lora: Any = None) -> Any:
    """Rehearses and exports the untrained policy; the tokenizer."""
    from peft import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from vpo_ray.train.lora import attach

    chosen = settings(lora=lora)
    tokenizer = rehearsed(folder, lora=lora)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model = attach(model, chosen.lora) if chosen.lora else model
    job = job_of(folder, tokenizer, chosen, out)
    export_policy(model, get_peft_model_state_dict(model) if chosen.lora else model.state_dict(), job, FACTS)
    return tokenizer


@pytest.mark.parametrize(
    ("given", "lora"),
    [
        ({"do_sample": None, "temperature": 0.9, "top_p": 0.6}, None),  # Vicuna, Llama 2
        ({"do_sample": None, "temperature": 0.9, "top_p": 0.6}, {"r": 2}),
        ({"do_sample": None, "temperature": 0.9, "top_p": 0.6}, {"r": 2, "merge": False}),
        ({"do_sample": False, "top_k": 5, "early_stopping": True, "length_penalty": 2.0}, None),
        ({"pad_token_id": -1, "output_scores": True}, None),
        ({"_from_model_config": True, "max_length": 4096, "transformers_version": "4.31.0"}, None),
    ],
)
def test_a_generation_config_that_loads_is_exported_with_its_meaning(
    policy: Edit, tmp_path: Path, given: dict[str, Any], lora: Any
):
    from transformers import GenerationConfig

    folder = policy(generation_config=given)
    tokenizer = exported(folder, tmp_path / "out", lora)
    before, after = (GenerationConfig.from_pretrained(at) for at in (folder, tmp_path / "out"))
    assert after.eos_token_id[0] == end_of_turn(tokenizer, TASK_PROMPT)[-1]
    for key in given.keys() - {"transformers_version"}:
        assert getattr(after, key) == getattr(before, key) == given[key]


def test_generation_keys_in_the_models_config_become_those_of_the_generation_config(
    policy: Edit, tmp_path: Path
):
    """As in models of before 2023, which have no generation_config.json."""
    from transformers import AutoModelForCausalLM

    folder = policy(config={"temperature": 0.7, "max_length": 100, "top_k": 3})
    (folder / "generation_config.json").unlink()
    exported(folder, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (written.temperature, written.max_length, written.top_k) == (0.7, 100, 3)


@pytest.mark.parametrize(
    ("files", "changes", "says"),
    [
        ({"generation_config": {"max_new_tokens": 0}}, {}, r"generation_config\.json does not load.*max_new"),
        (
            {"generation_config": {"num_return_sequences": 3, "do_sample": False}},
            {},
            "does not load.*num_return_sequences",
        ),
        ({"config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, {}, "quantised .gptq."),
        ({"config": {"model_type": "t5"}}, {}, "is not a causal language model"),
        ({}, {"lora": {"target_modules": ["no_such_layer"]}}, "not found"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused(
    policy: Edit, files: Any, changes: dict[str, Any], says: str
):
    with pytest.raises(TrainError, match=f"(?s){says}"):
        rehearsed(policy(**files), **changes)


def test_a_tokenizer_that_does_not_survive_being_saved_is_refused(policy: Edit):
    folder = policy()
    tokenizer = load_tokenizer(str(folder), TASK_PROMPT)

    class Forgetful(type(tokenizer)):  # type: ignore[misc]
        def save_pretrained(self, folder: Any, **options: Any) -> Any:
            super().save_pretrained(folder, **options)
            Path(folder, "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")

    tokenizer.__class__ = Forgetful
    with pytest.raises(TrainError, match=r"not the same after it is saved.*the chat template differs"):
        rehearse(job_of(folder, tokenizer, settings()))


def test_where_the_export_cannot_lie_is_told(tmp_path: Path):
    check_room(str(tmp_path / "new" / "policy"), 1000)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(TrainError, match=r"file is where the trained policy goes, but it is not a folder"):
        check_room(str(tmp_path / "file"), 1000)
    with pytest.raises(TrainError, match=r"below, where the trained policy goes, cannot be written"):
        check_room(str(tmp_path / "file" / "below"), 1000)
    with pytest.raises(TrainError, match=r"GB left on this node, and the export will take"):
        check_room(str(tmp_path / "policy"), 2**60)


def test_what_the_program_or_its_input_is_to_blame_for_is_not_tried_again(tmp_path: Path):
    import torch

    folder = Folder(str(tmp_path))
    for error in (TrainError("no"), ValueError("no"), KeyError("no"), TypeError("no"), ImportError("no")):
        assert failures.is_permanent(error)
    for other in (OSError("no"), MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("gloo: closed")):
        assert not failures.is_permanent(other)
    assert failures.recorded(folder) is None
    failures.clear(folder)
    failures.record(folder, ValueError("as it is"))
    assert failures.recorded(folder) == "ValueError: as it is"
    failures.clear(folder)
    assert failures.recorded(folder) is None


@pytest.mark.ray
@pytest.mark.slow
def test_a_failure_on_one_worker_that_no_retry_mends_ends_training_of_all(
    ray_cluster: None, tiny_models: Path, tmp_path: Path
):
    """Rank 0 finds that the export has no room while rank 1 goes on to the first step."""
    (tmp_path / "policy").write_text("in the way", "utf-8")
    chosen = settings(workers=2, max_failures=3)
    with pytest.raises(TrainError, match=r"^sft: .*is where the trained policy goes, but it is not a folder"):
        run(tmp_path, tiny_models / "policy", chosen, "sft", sft_rows(4))
    (tmp_path / "policy").unlink()
    assert run(tmp_path, tiny_models / "policy", chosen, "sft", sft_rows(4)).trained
