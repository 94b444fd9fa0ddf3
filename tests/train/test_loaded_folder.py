"""What is in a model's folder is looked at before it is loaded, and the error says what to do."""

import json
import shutil
from pathlib import Path

import pytest
from train_data import settings

from vpo_ray.train.examples import TrainError
from vpo_ray.train.model_files import refuse_adapter
from vpo_ray.train.zero import load_model


@pytest.fixture
def model(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "policy", tmp_path / "model"))


def test_weights_that_are_not_whole_are_told(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TrainError, match=rf"{weights} has \d+ of \d+ bytes: download it again"):
        load_model(str(model), settings(), {}, None, False)
    weights.write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")
    with pytest.raises(TrainError, match=r"pointers in the place of model\.safetensors: run `git lfs pull`"):
        load_model(str(model), settings(), {}, None, False)


def test_beside_an_adapter_its_base_model_would_be_loaded(model: Path) -> None:
    refuse_adapter(str(model))
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}), "utf-8")
    with pytest.raises(TrainError, match="is a LoRA adapter, not a whole model"):
        refuse_adapter(str(model))
