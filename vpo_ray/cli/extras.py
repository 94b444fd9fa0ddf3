"""Which extra of the package brings a module that is not installed."""

from __future__ import annotations

# What `engines` of pyproject.toml installs, by the names that are imported.
_ENGINES = {
    "accelerate", "av", "cv2", "deepspeed", "diffusers", "fastapi", "google", "openai", "pandas", "peft",
    "safetensors", "sentencepiece", "starlette", "tensorboardX", "tokenizers", "torch", "torchao",
    "transformers", "uvicorn", "vllm",
}  # fmt: skip


def install_advice(error: ModuleNotFoundError) -> str | None:
    """What to install, or None where no extra has the module."""
    module = (error.name or "").partition(".")[0]
    if module not in _ENGINES:
        return None
    return (
        f'{module} is not installed, and this command needs it: pip install "vpo-ray[gpu]" '
        '(or "vpo-ray[cpu]", on a machine without NVIDIA GPUs)'
    )
