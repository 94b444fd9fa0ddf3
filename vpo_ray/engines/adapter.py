"""A policy that is a LoRA adapter (arXiv 2106.09685): a folder, as peft saves it, that names its base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_ray.recipe import locate

# The ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class AdapterError(ValueError):
    """A folder with an adapter that cannot be loaded."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it: a folder, the model that it is for, and its rank."""

    folder: str
    base: str
    rank: int

    def engine_kwargs(self) -> dict[str, Any]:
        room = next((rank for rank in _RANKS if rank >= self.rank), _RANKS[-1])
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def adapter_of(model: str) -> Adapter | None:
    """The adapter in a local folder, or None where it holds a whole model.

    Raises:
        AdapterError: its `adapter_config.json` cannot be used.
    """
    path = Path(model, "adapter_config.json")
    if "://" in model or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
        base, rank = locate(config["base_model_name_or_path"]), int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the settings of a LoRA adapter: {error}") from error
    return Adapter(str(path.parent.resolve()), base, rank)
