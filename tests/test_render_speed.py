"""The benchmark that needs a GPU, as far as a CPU can take it: small sizes, a variant of each kind."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from vpo_ray.recipe import Render

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "benchmarks/render_speed.py"
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 32,
        "time_embed_dim": 8,
        "use_rotary_positional_embeddings": True,
    },
    "vae": {
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "text_encoder": {
        "vocab_size": 1000,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
    },
}
SHAPE = {"frames": 9, "height": 32, "width": 48, "steps": 3}


@pytest.fixture(scope="module")
def speed() -> Any:
    spec = importlib.util.spec_from_file_location("render_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(speed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    speed.random_weights(folder, SMALL)
    return folder


def test_the_real_size_is_the_real_size(speed: Any) -> None:
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**speed.COGVIDEOX_5B["transformer"])
        encoder = T5EncoderModel(T5Config(**speed.COGVIDEOX_5B["text_encoder"]))
    billions = [sum(p.numel() for p in part.parameters()) / 1e9 for part in (transformer, encoder)]
    assert billions == pytest.approx([5.57, 4.76], abs=0.01)


@pytest.mark.parametrize("variant", ["plain", "pyramid"])
def test_a_variant_is_measured(speed: Any, model: Path, variant: str) -> None:
    found = speed.measure(Render(model=str(model), dtype="bfloat16", **SHAPE), variant, videos=2)
    assert found["seconds"] > 0
    assert found["load_seconds"] > 0
    assert found.keys() >= {"first_seconds", "peak_gb"}


def test_a_variant_that_cannot_run_is_a_result(speed: Any, model: Path) -> None:
    """In a process of its own, as the command does it."""
    sets = [f"{key}={value}" for key, value in {**SHAPE, "batch_size": 2}.items()]
    args = Namespace(model=str(model), preset="cogvideox-5b", steps=None, set=sets, videos=1)
    assert "render.batch_size=1" in speed.in_a_process(args, "first_block")["error"]
