"""A policy that is a LoRA adapter (arXiv 2106.09685), as peft saves it: its files name the base model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from vpo_ray.files.folder import Folder, join, parent_of
from vpo_ray.recipe import locate
from vpo_ray.storage.model_cache import fetch_for_engine

_SETTINGS = "adapter_config.json"
# The maximum ranks that vLLM supports.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class AdapterError(ValueError):
    """A folder with an adapter that cannot be loaded."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it: its folder or URI, its base model, and its rank."""

    folder: str
    base: str
    rank: int

    def engine_kwargs(self) -> dict[str, Any]:
        room = next((rank for rank in _RANKS if rank >= self.rank), _RANKS[-1])
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def on_node(self) -> Adapter:
        """The adapter with local paths: URIs are fetched to this node."""
        return replace(self, folder=fetch_for_engine(self.folder), base=fetch_for_engine(self.base))


def adapter_of(model: str) -> Adapter | None:
    """The adapter in a local folder or at a URI, or None for a whole model.

    Raises:
        AdapterError: its `adapter_config.json` cannot be used.
        StorageError: the URI cannot be opened.
    """
    if "://" not in model and not os.path.isdir(model):
        return None
    place = Folder(model)
    if not place.exists(_SETTINGS):
        return None
    path = place.at(_SETTINGS)
    try:
        config = json.loads(place.read(_SETTINGS))
        base, rank = _base_of(place, config["base_model_name_or_path"]), int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the settings of a LoRA adapter: {error}") from error
    return Adapter(place.uri, base, rank)


def _base_of(place: Folder, named: str) -> str:
    """The base model of an adapter. Where its folder is gone and one of its name lies beside the adapter, as
    in a run directory that was moved, it is that."""
    base = locate(named)
    if "://" not in base and not (os.path.isabs(base) and not os.path.exists(base)):
        return base
    if "://" in base and Folder(base).exists("config.json"):
        return base
    beside = join(parent_of(place.uri), base.partition("?")[0].rstrip("/").rpartition("/")[2])
    return beside if Folder(beside).exists("config.json") else base
