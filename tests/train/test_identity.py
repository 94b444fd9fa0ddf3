"""What a phase's model is known by: a phase is trained anew where that changes, and only there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from train_data import TASK_PROMPT, TWO_WORKERS, pairs

from vpo_ray.storage.run_dir import RunDir
from vpo_ray.train import PhaseSpec, train
from vpo_ray.train.job import job_id
from vpo_ray.train.model_files import former_identity, identity


class Began(Exception):
    """Training would begin, as the job that this names."""


@pytest.fixture
def model(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "policy", tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def began(begun: Any) -> None:
        raise Began(begun.id)

    monkeypatch.setattr("vpo_ray.train.rehearsal.rehearse", began)


def spec_of(model: Path, folder: Path) -> PhaseSpec:
    return PhaseSpec(
        phase="dpo", settings=TWO_WORKERS, model=str(model), task_prompt=TASK_PROMPT, seed=5,
        out=str(folder / "policy"), run_uri=str(folder), fingerprint="0123456789abcdef",
    )  # fmt: skip


def finish(spec: PhaseSpec, id: str) -> None:
    facts = {"job": id, "steps": 12, "metrics": {}, "rows": 8, "dropped": {}, "warnings": []}
    RunDir(spec.out).write_json("vpo.json", facts)


def test_a_finished_phase_stays_finished_whatever_else_lies_beside_its_model(
    model: Path, tmp_path: Path
) -> None:
    spec = spec_of(model, tmp_path / "run")
    finish(spec, job_id(spec, pairs(8)))
    (model / "README.md").write_text("# A model\n", "utf-8")
    (model / ".gitattributes").write_text("*.safetensors filter=lfs\n", "utf-8")
    (model / ".cache/huggingface/download").mkdir(parents=True)
    (model / ".cache/huggingface/download/config.json").write_text("{}", "utf-8")
    (model / "original").mkdir()
    (model / "original/consolidated.pth").write_bytes(b"the same weights in another format")
    (model / "pytorch_model.bin").write_bytes(b"the same weights, not loaded")
    moved = spec_of(Path(shutil.copytree(model, tmp_path / "elsewhere")), tmp_path / "run")
    assert not train(spec, pairs(8)).trained
    assert not train(moved, pairs(8)).trained


def test_the_checkpoints_of_a_phase_that_ended_as_its_driver_did_are_deleted(
    model: Path, tmp_path: Path
) -> None:
    spec = spec_of(model, tmp_path / "run")
    run, id = RunDir(spec.run_uri), job_id(spec, pairs(8))
    finish(spec, id)
    run.write_json(f"checkpoints/dpo-{id[:16]}/step-000003/progress.json", {"step": 3})
    other = f"checkpoints/dpo-{'0' * 16}/step-000003/progress.json"
    run.write_json(other, {"step": 3})
    assert not train(spec, pairs(8)).trained
    assert [name for name in run.files() if name.startswith("checkpoints/")] == [other]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "chat_template.jinja", "config.json", "tokenizer.json"]
)
def test_a_phase_is_trained_anew_where_what_is_loaded_changed(model: Path, tmp_path: Path, name: str) -> None:
    spec = spec_of(model, tmp_path / "run")
    finish(spec, job_id(spec, pairs(8)))
    before = identity(str(model), None)
    file = model / name
    data = file.read_bytes() if file.exists() else b"{{ messages }}"
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    assert identity(str(model), None) != before
    if name == "model.safetensors":
        with pytest.raises(Began):
            train(spec, pairs(8))


def test_an_earlier_version_s_phases_are_known_by_its_ids(model: Path, tmp_path: Path) -> None:
    spec = spec_of(model, tmp_path / "run")
    former = job_id(spec, pairs(8), former_identity)
    assert former != job_id(spec, pairs(8))
    finish(spec, former)
    assert not train(spec, pairs(8)).trained
    begun = spec_of(model, tmp_path / "half-done")
    with pytest.raises(Began, match=job_id(begun, pairs(8))):
        train(begun, pairs(8))
    RunDir(begun.run_uri).write_json(
        f"checkpoints/dpo-{former[:16]}/step-000003/progress.json", {"step": 3, "workers": 2, "curve": []}
    )
    with pytest.raises(Began, match=former):
        train(begun, pairs(8))
